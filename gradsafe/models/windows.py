"""Many prompts to token ids, and overlapping windows for prompts longer than the context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from gradsafe._checks import refuse
from gradsafe.models.encode import ContextOverflowError, Encoded, Encoder, located
from gradsafe.models.encoding import Encoding, Prompt, last_user_turn, turns_alone
from gradsafe.models.pieces import Openings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_windows(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    response: str,
    encoding: Encoding | None = None,
    *,
    overlap: float = 0.25,
    **options: Any,
) -> list[Encoded]:
    """Encode a prompt of any length as windows that fit the context.

    The user prompt is cut at token boundaries and every piece is rendered in the template anew, so
    each window is a complete chat. Of a conversation the last user turn is cut, and every window
    repeats the other turns. Every character of the cut text lies in at least one window.

    Args:
        tokenizer: A fast tokenizer (character offsets are needed where a prompt must be cut).
        prompt: As in `encode`.
        response: Response text, the same for every window.
        encoding: As in `encode`; `max_length` is the longest allowed number of tokens per window,
            template and response included (None for no limit).
        overlap: Share of a window's prompt tokens that the next window repeats, in [0, 1).
        **options: As in `encode`.

    Returns:
        One item where the prompt fits, else the windows from left to right.

    Raises:
        ContextOverflowError: Template, other turns and response leave no room for the prompt.
        TypeError: As in `encode`.
        ValueError: As in `encode`; `overlap` out of range; a slow tokenizer.
    """
    _check_overlap(overlap)
    return _windows(Encoder(tokenizer, response, encoding, **options), prompt, overlap)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    response: str,
    encoding: Encoding | None = None,
    *,
    overlap: float = 0.25,
    names: Sequence[str] | None = None,
    turns: Literal["all", "worst"] = "all",
    **options: Any,
) -> tuple[list[Encoded], list[int]]:
    """Encode many prompts against one response.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: User texts or conversations, as in `encode`; at least one, none empty.
        response: Response text.
        encoding: As in `encode`. With `overflow="window"` a prompt beyond `max_length` is cut into
            windows; with "error" it is refused. See `context_length` for `max_length`.
        overlap: As in `encode_windows`.
        names: What error messages call the prompts; None for "prompts[0]" and so on.
        turns: "all" encodes a conversation as a whole; "worst" encodes every turn of a user or tool
            on its own, as a user turn after the system message.
        **options: As in `encode`.

    Returns:
        The encoded items in prompt order, and for each the index of the prompt it belongs to.

    Raises:
        ContextOverflowError: `overflow="error"` and a prompt is too long; names its index.
        TypeError: `prompts` is no list or a single prompt, or an entry is no prompt; names its
            index.
        ValueError: No prompts, a prompt that `encode` refuses (names its index), or bad options.
    """
    expect_prompts(prompts)
    _check_overlap(overlap)
    encoder = Encoder(tokenizer, response, encoding, **options)
    openings = Openings(encoder)
    cut = encoder.encoding.overflow == "window"
    items: list[Encoded] = []
    owners: list[int] = []
    for index, prompt in enumerate(prompts):
        with located(names[index] if names is not None else f"prompts[{index}]"):
            parts = turns_alone(prompt) if turns == "worst" else [prompt]
            found = [_windows(encoder, p, overlap) if cut else [encoder(p)] for p in parts]
        typed = sum(windows[0].control_tokens for windows in found)
        pieces = [
            replace(item, control_tokens=typed, opening=openings.length(part, item))
            for part, windows in zip(parts, found, strict=True)
            for item in windows
        ]
        items.extend(pieces)
        owners.extend([index] * len(pieces))
    return items, owners


def expect_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise TypeError unless this is a list of prompts, and ValueError if it is empty."""
    where, expected = "encode_prompts", "a list of prompts"
    if isinstance(prompts, str):
        refuse(where, expected, "one str", "wrap it", TypeError)
    listed = hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")
    if not listed or isinstance(prompts, (Mapping, bytes)):
        do = "pass list(prompts)" if isinstance(prompts, Iterable) else "pass the prompts in a list"
        refuse(where, expected, type(prompts).__name__, do, TypeError)
    if len(prompts) == 0:
        refuse(where, "at least one prompt", "an empty list")
    if isinstance(prompts[0], Mapping):
        refuse(where, expected, "one conversation (a list of dicts)", "wrap it", TypeError)


def _windows(encoder: Encoder, prompt: Prompt, overlap: float) -> list[Encoded]:
    whole = encoder.encode_any_length(prompt)
    limit = encoder.encoding.max_length
    if limit is None or len(whole) <= limit:
        return [whole]
    text, with_text = last_user_turn(prompt)
    bounds = _token_bounds(encoder, text)
    count = len(bounds) - 1

    def next_character(begin: int, token: int) -> int:
        """The first token from `token` on that starts behind `begin`, or the end of the text."""
        # One character may span several tokens.
        return next(i for i in range(token, count + 1) if bounds[i] > bounds[begin])

    def largest_window(begin: int, end: int) -> tuple[int, Encoded]:
        """The largest end (and window) in (begin, end] that fits; at least one character."""
        smallest = next_character(begin, begin + 1)
        end = max(end, smallest)
        while True:
            window = encoder.encode_any_length(with_text(text[bounds[begin] : bounds[end]]))
            excess = len(window) - limit
            if excess <= 0:
                return end, window
            if end == smallest:
                raise ContextOverflowError(
                    f"gradsafe.encode_windows: template, response and a single character of the "
                    f"prompt (with the other turns of a conversation) take {len(window)} tokens, "
                    f"max_length is {limit}; shorten the other turns, template=, system= or the "
                    "response"
                )
            end = max(smallest, end - excess)

    # First guess of the prompt tokens per window; the template may merge tokens at the seams, so
    # each window is measured and shrunk where it does not fit.
    size = max(1, limit - (len(whole) - count))
    windows: list[Encoded] = []
    begin = reached = 0
    while True:
        end, window = largest_window(begin, min(count, begin + size))
        following = begin + 1
        # An overlap of long characters may leave no room for new ones: start further right then.
        if bounds[end] > reached:
            windows.append(replace(window, control_tokens=whole.control_tokens))
            reached = bounds[end]
            following = max(following, end - int(overlap * (end - begin)))
        if reached >= len(text):
            return windows
        begin = next_character(begin, following)


def _token_bounds(encoder: Encoder, text: str) -> list[int]:
    """Character positions where the text may be cut: 0, each token's start, its length."""
    if not encoder.tokenizer.is_fast:
        raise ValueError(
            "gradsafe.encode_windows: cutting a long prompt needs character offsets, which only "
            "fast tokenizers have; load it with use_fast=True or shorten the prompt"
        )
    bounds = [0]
    # Characters that belong to no token (dropped white space) stay with the token before them.
    for start in encoder.starts(text)[1:]:
        bounds.append(min(len(text), max(bounds[-1], start)))
    return [*bounds, len(text)]


def _check_overlap(overlap: float) -> None:
    if not 0 <= overlap < 1:
        refuse("encode_windows", "0 <= overlap < 1", overlap)

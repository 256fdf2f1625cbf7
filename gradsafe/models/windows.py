"""Many prompts to token ids, and overlapping windows for prompts longer than the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from gradsafe.models.encode import ContextOverflowError, Encoded, Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_windows(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    *,
    max_length: int,
    overlap: float = 0.25,
    template: str | None = None,
    system: str | None = None,
    append_eos: bool = False,
) -> list[Encoded]:
    """Encode a prompt of any length as windows that fit the context.

    The user prompt is cut at token boundaries and every piece is rendered in the template anew, so
    each window is a complete chat. Every character of the prompt lies in at least one window.

    Args:
        tokenizer: A fast tokenizer (character offsets are needed where a prompt must be cut).
        prompt: User text, not empty.
        response: Response text, the same for every window.
        max_length: Longest allowed number of tokens per window, template and response included.
        overlap: Share of a window's prompt tokens that the next window repeats, in [0, 1).
        template: As in `encode`.
        system: As in `encode`.
        append_eos: As in `encode`.

    Returns:
        One item where the prompt fits, else the windows from left to right.

    Raises:
        ContextOverflowError: Template and response alone leave no room for the prompt.
        TypeError: An argument that must be a string is not.
        ValueError: As in `encode`; `overlap` out of range; a slow tokenizer.
    """
    _check_overlap(overlap)
    encoder = Encoder(
        tokenizer,
        response,
        template=template,
        system=system,
        append_eos=append_eos,
        max_length=max_length,
    )
    return _windows(encoder, prompt, overlap)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    response: str,
    *,
    overflow: Literal["error", "window"] = "error",
    max_length: int | None,
    overlap: float = 0.25,
    template: str | None = None,
    system: str | None = None,
    append_eos: bool = False,
) -> tuple[list[Encoded], list[int]]:
    """Encode many prompts against one response.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: User texts; at least one, none empty.
        response: Response text.
        overflow: What to do with a prompt beyond `max_length`: raise, or cut it into windows.
        max_length: Longest allowed number of tokens, see `context_length`; None for no limit.
        overlap: As in `encode_windows`.
        template: As in `encode`.
        system: As in `encode`.
        append_eos: As in `encode`.

    Returns:
        The encoded items in prompt order, and for each the index of the prompt it belongs to.

    Raises:
        ContextOverflowError: `overflow="error"` and a prompt is too long; names its index.
        TypeError: `prompts` is a single string, or an entry is not a string; names its index.
        ValueError: No prompts, an empty prompt (names its index), or bad options.
    """
    if isinstance(prompts, str):
        raise TypeError("gradsafe.encode_prompts: expected a list of prompts, got one str; wrap it")
    if len(prompts) == 0:
        raise ValueError("gradsafe.encode_prompts: expected at least one prompt, got an empty list")
    if overflow not in ("error", "window"):
        raise ValueError(
            f'gradsafe.encode_prompts: expected overflow="error" or "window", got {overflow!r}'
        )
    _check_overlap(overlap)
    encoder = Encoder(
        tokenizer,
        response,
        template=template,
        system=system,
        append_eos=append_eos,
        max_length=max_length,
    )
    items: list[Encoded] = []
    owners: list[int] = []
    for index, prompt in enumerate(prompts):
        try:
            if overflow == "window":
                pieces = _windows(encoder, prompt, overlap)
            else:
                pieces = [encoder(prompt)]
        except ContextOverflowError as error:
            raise ContextOverflowError(f"prompts[{index}]: {error}") from error
        except TypeError as error:
            raise TypeError(f"prompts[{index}]: {error}") from error
        except ValueError as error:
            raise ValueError(f"prompts[{index}]: {error}") from error
        items.extend(pieces)
        owners.extend([index] * len(pieces))
    return items, owners


def _windows(encoder: Encoder, prompt: str, overlap: float) -> list[Encoded]:
    whole = encoder.encode_any_length(prompt)
    limit = encoder.max_length
    if limit is None or len(whole) <= limit:
        return [whole]
    bounds = _token_bounds(encoder.tokenizer, prompt)
    count = len(bounds) - 1
    # First guess of the prompt tokens per window; the template may merge tokens at the seams, so
    # each window is measured and shrunk where it does not fit.
    size = max(1, limit - (len(whole) - count))
    windows: list[Encoded] = []
    begin = reached = 0
    while True:
        end, window = _largest_window(encoder, prompt, bounds, begin, min(count, begin + size))
        following = begin + 1
        # An overlap of costly characters may leave no room for new ones: start further right then.
        if bounds[end] > reached:
            windows.append(window)
            reached = bounds[end]
            following = max(following, end - int(overlap * (end - begin)))
        if reached >= len(prompt):
            return windows
        # One character may span several tokens: a new window must start at a new character.
        while bounds[following] <= bounds[begin]:
            following += 1
        begin = following


def _largest_window(
    encoder: Encoder, prompt: str, bounds: list[int], begin: int, end: int
) -> tuple[int, Encoded]:
    """Return the largest end (and window) in (begin, end] that fits; at least one character."""
    smallest = begin + 1
    while bounds[smallest] <= bounds[begin]:
        smallest += 1
    end = max(end, smallest)
    limit = encoder.max_length
    assert limit is not None
    while True:
        window = encoder.encode_any_length(prompt[bounds[begin] : bounds[end]])
        excess = len(window) - limit
        if excess <= 0:
            return end, window
        if end == smallest:
            raise ContextOverflowError(
                f"gradsafe.encode_windows: template, response and a single character of the prompt "
                f"take {len(window)} tokens, max_length is {limit}; "
                f"shorten template=, system= or the response"
            )
        end = max(smallest, end - excess)


def _token_bounds(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Character positions where the prompt may be cut: 0, each token's start, its length."""
    if not tokenizer.is_fast:
        raise ValueError(
            "gradsafe.encode_windows: cutting a long prompt needs character offsets, which only "
            "fast tokenizers have; load it with use_fast=True or shorten the prompt"
        )
    encoding = tokenizer(
        prompt,
        add_special_tokens=False,
        return_offsets_mapping=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    bounds = [0]
    # Characters that belong to no token (dropped whitespace) stay with the token before them.
    for start, _ in encoding["offset_mapping"][1:]:
        bounds.append(min(len(prompt), max(bounds[-1], int(start))))
    bounds.append(len(prompt))
    return bounds


def _check_overlap(overlap: float) -> None:
    if not 0 <= overlap < 1:
        raise ValueError(f"gradsafe.encode_windows: expected 0 <= overlap < 1, got {overlap}")

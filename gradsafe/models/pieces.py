"""Token ids back to text, piece by piece, and which of them the user wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from gradsafe.models.encode import Encoded, Encoder
from gradsafe.models.encoding import Prompt, last_user_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # what a decoder writes for an incomplete character


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode token by token, so that the pieces join to the text of the whole.

    A token alone often decodes to something else: the space before a word disappears, and half a
    character becomes a replacement sign. So each piece is what its token adds to the text of a few
    tokens before it. A character of several tokens is the piece of its last token; the pieces of
    the others are empty.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Token ids.

    Returns:
        One text per id; special tokens are written out.
    """

    def decode(begin: int, end: int) -> str:
        text = tokenizer.decode(
            list(ids[begin:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    pieces: list[str] = []
    begin = done = 0  # [begin, done) is the context, [done, end) an incomplete character
    for end in range(1, len(ids) + 1):
        context, text = decode(begin, done), decode(begin, end)
        waits = end < len(ids) and (text.endswith(_INCOMPLETE) or len(text) <= len(context))
        pieces.append("" if waits else text[len(context) :])
        if not waits:
            begin, done = done, end
    return pieces


def probe_prompts(prompt: Prompt) -> list[Prompt]:
    """Two variants of a prompt for `prompt_span`, with another last user turn each."""
    _, with_text = last_user_turn(prompt)
    return [with_text(text) for text in ("0", "?")]


def prompt_span(item: Encoded, others: Sequence[Encoded]) -> slice:
    """Find the tokens of an encoded prompt that belong to the user's text.

    Args:
        item: The encoded prompt.
        others: Other texts in the same template, no two of which start or end alike; encode
            `probe_prompts(prompt)` to get them. Of a conversation this finds the last user turn.

    Returns:
        The tokens that are not the same in all of them; a token that the template's text and the
        user's share belongs to the user.
    """
    ids = item.input_ids[: item.prompt_length]
    rest = [other.input_ids[: other.prompt_length] for other in others]
    start = min(_common(ids, other) for other in rest)
    tail = min(_common(ids[::-1], other[::-1]) for other in rest)
    return slice(start, max(start, len(ids) - tail))


class Openings:
    """What a template and the system message write before the first user turn."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[str, list[int]] = {}  # ids by system turn

    def length(self, prompt: Prompt, item: Encoded) -> int:
        """Tokens of the opening of an encoded prompt; it depends on this prompt alone.

        The ids that two other user texts share after the same system turn, and the prompt, too; at
        least the last prompt token is not among them.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        head = turns[: 1 + (turns[0]["role"] == "system")]
        if head[-1]["role"] != "user":
            return 0
        key = json.dumps(head[:-1], default=str)
        if key not in self._known:
            _, with_text = last_user_turn(head)
            a, b = (self._encoder.encode_any_length(with_text(text)) for text in ("0", "?"))
            self._known[key] = a.input_ids[: _common(a.input_ids, b.input_ids)]
        return min(_common(self._known[key], item.input_ids), item.prompt_length - 1)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))

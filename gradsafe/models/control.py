"""Control tokens that a prompt types: special tokens that its text writes, not the template.

A chat template marks the turns with special tokens, and a tokenizer reads the same characters in a
prompt as the same tokens. To tell both apart, marks that no prompt can hold are put into the texts
before the template is rendered: a special token behind such a mark was typed.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from gradsafe._checks import refuse

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

# Private characters around a number that nobody can guess; no case, no white space.
_NUMBER = f"\ue000{secrets.randbits(64):020d}"
_TYPED, _EDGE, _KEPT = (_NUMBER + end for end in "\ue001\ue002\ue003")


class ControlTokens:
    """The special tokens of a tokenizer, as texts.

    These are the tokens that the tokenizer lists as special. Added tokens that are not (`<think>`
    in some families, runs of spaces in others) are words like any other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._special = [token for token in added if token.special]
        named = map(str, tokenizer.all_special_tokens)
        texts = {token.content for token in self._special} | set(named)
        self.texts = sorted(filter(None, texts), key=lambda text: (-len(text), text))
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self._pattern = re.compile(f"({_TYPED})?({'|'.join(map(re.escape, self.texts)) or '(?!)'})")
        self._ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._starts = {text[:end] for text in self.texts for end in range(1, len(text))}
        self._ends = {text[start:] for text in self.texts for start in range(1, len(text))}
        self._longest = max(map(len, self.texts), default=0)
        # A special token that is found after normalisation may be typed in other characters.
        self.normalized = any(token.normalized for token in self._special)

    def mark(self, value: Any) -> Any:
        """A text, or the texts inside a message, with a mark before every special token.

        Text that could complete one together with the template's text gets other marks around it.
        """
        if isinstance(value, str):
            marked = self._pattern.sub(lambda found: f"{_TYPED}{found[2]}", value)
            inner = value.strip()
            if inner and self._completes(inner):
                start, end = marked.index(marked.strip()), len(marked.rstrip())
                marked = f"{marked[:start]}{_EDGE}{marked[start:end]}{_EDGE}{marked[end:]}"
            return marked
        if isinstance(value, Mapping):
            return {name: self.mark(part) for name, part in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self.mark(part) for part in value]
        return value

    def count(self, text: str) -> int:
        """Number of special tokens in a text that have no mark before them."""
        return sum(not found[1] for found in self._pattern.finditer(text))

    def keep(self, marked: str) -> str:
        """A rendered text for `ids`: the special tokens without a mark stay special."""
        kept = self._pattern.sub(lambda m: m[0] if m[1] else self.kept(m[2]), marked)
        return unmarked(kept)

    def kept(self, text: str) -> str:
        """A special token as `keep` writes it."""
        return _KEPT + text

    def ids(self, text: str, special: bool) -> list[int]:
        """Token ids of a result of `keep`; `special` adds the tokens that the tokenizer adds."""
        backend, original = self._split
        found = backend.encode(text, add_special_tokens=special).ids
        if not special and not self._ids.isdisjoint(found):
            expected = "a tokenizer that can write special tokens as ordinary text"
            do = "leave split_special_tokens out, or remove special tokens from the prompt"
            refuse("encode", expected, "one whose vocabulary joins their characters", do)
        return [original.get(token, token) for token in found]

    def starts(self, text: str) -> list[int]:
        """Where each token of a text begins that has no special tokens."""
        backend, _ = self._split
        return [start for start, _ in backend.encode(text, add_special_tokens=False).offsets]

    @cached_property
    def _split(self) -> tuple[Tokenizer, dict[int, int]]:
        """A copy that splits special tokens but knows those with a prefix, and their true ids.

        A copy, since the option is a state of the tokenizer, which other threads use.
        """
        if self._backend is None:
            do = "load the tokenizer with use_fast=True, or leave split_special_tokens out"
            refuse("encode", "a fast tokenizer for split_special_tokens=True", "a slow one", do)
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        tokens = {token.content: token for token in self._special}
        known = [text for text in self.texts if backend.token_to_id(text) is not None]
        backend.add_tokens([_twin(self.kept(text), tokens.get(text)) for text in known])
        twins = ((backend.token_to_id(self.kept(t)), backend.token_to_id(t)) for t in known)
        return backend, {
            twin: token for twin, token in twins if twin is not None and token is not None
        }

    def _completes(self, text: str) -> bool:
        sizes = range(1, min(self._longest, len(text) + 1))
        return any(text[:n] in self._ends or text[-n:] in self._starts for n in sizes) or any(
            text in special for special in self.texts
        )


def _twin(text: str, token: Any) -> AddedToken:
    """Another name of a special token, with its flags; not special, so it is never split."""
    from tokenizers import AddedToken

    left, right = (token is not None and getattr(token, side) for side in ("lstrip", "rstrip"))
    return AddedToken(text, lstrip=left, rstrip=right, normalized=False, special=False)


def unmarked(text: str) -> str:
    """A text without the marks of `ControlTokens.mark`."""
    return text.replace(_TYPED, "").replace(_EDGE, "")


_KNOWN: WeakKeyDictionary[Any, tuple[Any, ControlTokens]] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """The special tokens of a tokenizer; found once, and anew when tokens were added."""
    state = (len(tokenizer), *map(str, tokenizer.all_special_tokens))
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        known = _KNOWN[tokenizer] = state, ControlTokens(tokenizer)
    return known[1]

"""Special tokens whose text is typed into prompts: found, counted, and kept ordinary text."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from gradsafe._checks import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters without a meaning
_splitting: WeakKeyDictionary[Any, PreTrainedTokenizerBase] = WeakKeyDictionary()


class ControlTokens:
    """The special tokens of a tokenizer, and the texts that spell them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        special = {str(token): index for index, token in added if token.special and str(token)}
        for text, index in zip(
            tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True
        ):
            special.setdefault(str(text), index)
        self.tokenizer = tokenizer
        self.ids = frozenset(special.values()) - {tokenizer.unk_token_id}
        longest_first = sorted(special, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def count(self, prompt: Any) -> int:
        """How often the texts of a prompt, whatever their place in it, spell a special token."""
        found = 0

        def look(text: str) -> str:
            nonlocal found
            found += len(self.pattern.findall(text))
            return text

        map_texts(prompt, look)
        return found

    def marks(self, texts: Any, rendered: str) -> dict[str, str]:
        """For each special token that `texts` spell, a character that `rendered` does not hold."""
        typed: dict[str, None] = {}
        map_texts(texts, lambda text: [typed.setdefault(t) for t in self.pattern.findall(text)])
        used = set(rendered)
        free = (character for character in map(chr, _PRIVATE_USE) if character not in used)
        return dict(zip(typed, free, strict=False))

    def mark(self, texts: Any, marks: Mapping[str, str]) -> Any:
        """`texts` with each special token that they spell replaced by its mark."""
        return map_texts(texts, lambda text: self.pattern.sub(lambda m: marks[m[0]], text))

    def ordinary_ids(self, text: str) -> list[int]:
        """The tokens of a text, all of them ordinary."""
        options = {"truncation": False, "padding": False, "verbose": False}
        encoding = splitting(self.tokenizer)(text, add_special_tokens=False, **options)
        ids = [int(token) for token in encoding["input_ids"]]
        if not self.ids.isdisjoint(ids):
            expected = "a tokenizer that can write special tokens as ordinary text"
            do = "use split_special_tokens=False"
            refuse("encode", expected, type(self.tokenizer).__name__, do)
        return ids

    def split(
        self, text: str, marks: Mapping[str, str], tokenize: Callable[[str], list[int]]
    ) -> list[int]:
        """Tokens of a rendered text; `tokenize` makes those of the parts without a mark.

        The text is cut only at special tokens that have no mark: those of the template.
        """
        marked = re.compile("[" + "".join(marks.values()) + "]")
        typed = {mark: text for text, mark in marks.items()}
        ids: list[int] = []
        plain = ""
        for part in re.split(f"({self.pattern.pattern})", text):
            if marked.search(part):
                ids += tokenize(plain) if plain else []
                ids += self.ordinary_ids(marked.sub(lambda m: typed[m[0]], part))
                plain = ""
            else:
                plain += part
        return ids + (tokenize(plain) if plain else [])


def splitting(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer to which special tokens are ordinary text.

    A copy, since the option is a state of fast tokenizers, which other threads would meet.
    """
    if tokenizer not in _splitting:
        other = copy.deepcopy(tokenizer)
        other.split_special_tokens = True
        _splitting[tokenizer] = other
    return _splitting[tokenizer]


def map_texts(value: Any, change: Callable[[str], Any]) -> Any:
    """A prompt, or a part of it, with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_texts(part, change) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [map_texts(item, change) for item in value]
    return value

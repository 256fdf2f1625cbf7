"""Prompt and response to token ids: the prompt ids are always a prefix of the full ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from gradsafe._checks import refuse
from gradsafe.models.control import control_tokens, unmarked
from gradsafe.models.encoding import Encoding, Prompt, check_rendered, expect_text, messages_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ContextOverflowError", "Encoded", "Encoder", "Encoding", "Prompt", "encode", "located"]

_FIELD = re.compile(r"\{(prompt|system)\}")
_EXAMPLE = r'template="User: {prompt}\nAssistant: "'


class ContextOverflowError(ValueError):
    """A prompt does not fit the model's context; it is never truncated silently."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put a place in front of the messages of errors about one prompt."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kinds = (ContextOverflowError, TypeError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{where}: {error}") from error


@dataclass(frozen=True)
class Encoded:
    """Token ids of one prompt followed by its response.

    Attributes:
        input_ids: Prompt ids, then response ids.
        prompt_length: Number of prompt ids, at least 1.
        control_tokens: Number of special tokens that the prompt's own text writes, not the
            template; of a window, those of the whole prompt. See
            `Encoding.split_special_tokens`, which does not change it.
        opening: Number of ids at the beginning that the template and the system message fix,
            whatever the user writes; 0 where it was not determined.
    """

    input_ids: list[int]
    prompt_length: int
    control_tokens: int = 0
    opening: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length < len(self.input_ids):
            got = f"prompt_length={self.prompt_length} of {len(self.input_ids)} tokens"
            refuse("Encoded", "at least one prompt token and one response token", got)

    def __len__(self) -> int:
        return len(self.input_ids)

    def after(self, count: int) -> Encoded:
        """The item without its first `count` ids."""
        return replace(
            self,
            input_ids=self.input_ids[count:],
            prompt_length=self.prompt_length - count,
            opening=max(0, self.opening - count),
        )

    @property
    def response_length(self) -> int:
        """Number of response ids, at least 1."""
        return len(self.input_ids) - self.prompt_length


class Encoder:
    """Encodes prompts against one fixed response, which is checked and tokenised once.

    Arguments and errors are those of `encode`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        response: str,
        encoding: Encoding | None = None,
        **options: Any,
    ) -> None:
        expect_text("response", response)
        self.tokenizer = tokenizer
        self.encoding = replace(encoding or Encoding(), **options)
        template = self.encoding.template
        self._plain = template is not None and "{{" not in template and "{%" not in template
        self._fields = set(_FIELD.findall(template or ""))
        self._check_template()
        self.response_ids = self._response_ids(response)
        self._control = control_tokens(tokenizer)

    def __call__(self, prompt: Prompt) -> Encoded:
        """Encode one prompt."""
        encoded = self.encode_any_length(prompt)
        limit = self.encoding.max_length
        if limit is not None and len(encoded) > limit:
            raise ContextOverflowError(
                f"gradsafe.encode: prompt and response take {len(encoded)} tokens "
                f"({encoded.prompt_length} + {encoded.response_length}), max_length is {limit}; "
                f'shorten the prompt or use overlapping windows of it with overflow="window"'
            )
        return encoded

    def encode_any_length(self, prompt: Prompt) -> Encoded:
        """Encode one prompt whatever `max_length` is."""
        messages = messages_of(prompt, self.encoding.system)
        text = self._render(messages)
        if not self._plain:
            check_rendered(messages, text)
        typed, kept = self._typed(messages, text)
        prompt_ids = self._prompt_ids(text) if kept is None else self._prompt_ids(kept, split=True)
        if not prompt_ids:
            raise ValueError(
                "gradsafe.encode: the rendered prompt has no token, so nothing predicts the first "
                f"response token; use a template with text of its own, for example {_EXAMPLE}"
            )
        return Encoded(prompt_ids + self.response_ids, len(prompt_ids), typed)

    def _check_template(self) -> None:
        template, system = self.encoding.template, self.encoding.system
        if template is None and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "gradsafe.encode: the tokenizer has no chat template; "
                f"pass template= (--template in a shell), for example {_EXAMPLE}"
            )
        if self._plain and "prompt" not in self._fields:
            expected = "template= to be a Jinja chat template or a text that contains {prompt}"
            refuse("encode", f"{expected}, for example {_EXAMPLE}", repr(template))
        if self._plain and system is not None and "system" not in self._fields:
            raise ValueError(
                "gradsafe.encode: system= is given, but template= has no {system} to hold it"
            )

    def _response_ids(self, response: str) -> list[int]:
        ids = self._tokenize(response)
        if not ids:
            raise ValueError(
                f"gradsafe.encode: response={response!r} has no token; use a text such as 'Sure'"
            )
        if self.encoding.append_eos:
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise ValueError(
                    "gradsafe.encode: append_eos=True, but the tokenizer has no EOS token; "
                    "set tokenizer.eos_token or use append_eos=False"
                )
            ids.append(int(eos))
        return ids

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if self._plain:
            return self._plain_text(messages)
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        if self.encoding.template is not None:
            options["chat_template"] = self.encoding.template
        try:
            text: Any = self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError as error:
            system = messages[0]["role"] == "system"
            hint = "; leave out system= if the model knows no system role" if system else ""
            raise ValueError(
                f"gradsafe.encode: the chat template failed: {error}{hint}, "
                f"or pass another template=, for example {_EXAMPLE}"
            ) from error
        assert isinstance(text, str)
        return text

    def _plain_text(self, messages: list[dict[str, Any]]) -> str:
        values = {"prompt": messages[-1]["content"], "system": ""}
        if len(messages) == 2 and messages[0]["role"] == "system" and "system" in self._fields:
            values["system"] = messages[0]["content"]
        elif len(messages) > 1:
            expected = f"a single user turn for the plain template {self.encoding.template!r}"
            got = f"the roles {', '.join(message['role'] for message in messages)}"
            do = "pass a Jinja chat template as template= (a system turn needs {system} in it)"
            refuse("encode", expected, got, do)
        # One pass over the template alone: braces inside the prompt stay as they are.
        return _FIELD.sub(lambda match: values[match.group(1)], self.encoding.template or "")

    def _typed(self, messages: list[dict[str, Any]], text: str) -> tuple[int, str | None]:
        """Number of typed special tokens, and the text that splits them, None if `text` serves."""
        own, split = int(self.encoding.system is not None), self.encoding.split_special_tokens
        marked = messages[:own] + [
            {**self._control.mark(turn), "role": turn["role"]} for turn in messages[own:]
        ]
        if marked == messages and not (split and self._control.normalized):
            return 0, None
        rendered = self._render(marked)
        if unmarked(rendered) != text:
            if split:
                expected = "a chat template that writes the text of a prompt unchanged"
                got = "one that depends on the special tokens in it"
                do = "leave split_special_tokens out, or remove them from the prompt"
                refuse("encode", expected, got, do)
            own_text = json.dumps(messages[own:], ensure_ascii=False, default=str)
            return self._control.count(own_text), None
        typed = self._control.count(text) - self._control.count(rendered)
        return typed, self._control.keep(rendered) if split else None

    def _prompt_ids(self, text: str, split: bool = False) -> list[int]:
        tokenize = self._control.ids if split else self._tokenize
        bare = tokenize(text, False)
        # A chat template writes BOS itself: rendering to text first avoids a second one.
        bos = str(self.tokenizer.bos_token or "")
        if not self._plain or (bos and text.startswith(self._control.kept(bos) if split else bos)):
            return bare
        ids = tokenize(text, True)
        # Some tokenizers close every text with EOS; the response must follow the prompt directly.
        eos = self.tokenizer.eos_token_id
        added = _trailing(ids, eos) - _trailing(bare, eos)
        return ids[: len(ids) - added] if added > 0 else ids

    def starts(self, text: str) -> list[int]:
        """Where each token of a prompt's text begins; needs a fast tokenizer."""
        if self.encoding.split_special_tokens:
            return self._control.starts(text)
        options = {"truncation": False, "padding": False, "verbose": False}
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, **options
        )
        return [int(start) for start, _ in encoding["offset_mapping"]]

    def _tokenize(self, text: str, special: bool = False) -> list[int]:
        options = {"truncation": False, "padding": False, "verbose": False}
        encoding = self.tokenizer(text, add_special_tokens=special, **options)
        return [int(token) for token in encoding["input_ids"]]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    response: str,
    encoding: Encoding | None = None,
    **options: Any,
) -> Encoded:
    """Encode one prompt and response.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: User text, or a conversation: a list of dicts with "role" (system, user, assistant
            or tool) and "content" (text); the last turn is of the user or a tool.
        response: Response text; tokenised on its own, without special tokens.
        encoding: The options; None for the defaults.
        **options: Fields of `Encoding` (template, system, append_eos, max_length,
            split_special_tokens), in place of those of `encoding`.

    Returns:
        Prompt ids followed by response ids.

    Raises:
        TypeError: An argument that must be text is not, or an unknown option.
        ValueError: No template, a template that leaves out a turn, an empty prompt or response, a
            conversation that no response can follow, or contradicting options.
        ContextOverflowError: More than `max_length` tokens.

    Example:
        >>> encode(tokenizer, "What is 2 + 2?", "Sure", system="Be brief.")
        >>> encode(tokenizer, [{"role": "user", "content": "Hi"}], "Sure", append_eos=True)
    """
    return Encoder(tokenizer, response, encoding, **options)(prompt)


def _trailing(ids: list[int], token: int | None) -> int:
    count = 0
    while token is not None and count < len(ids) and ids[-1 - count] == token:
        count += 1
    return count

"""Prompt and response to token ids: the prompt ids are always a prefix of the full ids."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from gradsafe.models.inspection import text_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_FIELD = re.compile(r"\{(prompt|system)\}")
_EXAMPLE = r'template="User: {prompt}\nAssistant: "'
# Tokenizers without a known limit report about 1e30.
_SANE_LENGTH = 10**9


class ContextOverflowError(ValueError):
    """A prompt does not fit the model's context; it is never truncated silently."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one prompt followed by its response.

    Attributes:
        input_ids: Prompt ids, then response ids.
        prompt_length: Number of prompt ids, at least 1.
    """

    input_ids: list[int]
    prompt_length: int

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length < len(self.input_ids):
            raise ValueError(
                f"gradsafe.Encoded: expected at least one prompt token and one response token, got "
                f"prompt_length={self.prompt_length} of {len(self.input_ids)} tokens"
            )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def response_length(self) -> int:
        """Number of response ids, at least 1."""
        return len(self.input_ids) - self.prompt_length


class Encoder:
    """Encodes prompts against one fixed response: options are checked and tokenised once.

    Args:
        tokenizer: A transformers tokenizer.
        response: The text whose likelihood is measured after every prompt.
        template: None for the tokenizer's chat template; a Jinja chat template (it contains `{{`
            or `{%`); or a plain text with `{prompt}` and optionally `{system}`.
        system: System message.
        append_eos: Close the response with the tokenizer's EOS token.
        max_length: Longest allowed number of tokens, prompt and response together.

    Raises:
        ValueError: No usable template, an empty response, or an option that contradicts another.
        TypeError: `response`, `template` or `system` is not a string.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        response: str,
        *,
        template: str | None = None,
        system: str | None = None,
        append_eos: bool = False,
        max_length: int | None = None,
    ) -> None:
        _expect_text("response", response)
        if template is not None:
            _expect_text("template", template)
        if system is not None:
            _expect_text("system", system)
        if max_length is not None and max_length < 2:
            raise ValueError(f"gradsafe.encode: expected max_length >= 2, got {max_length}")
        self.tokenizer = tokenizer
        self.template = template
        self.system = system
        self.max_length = max_length
        self._jinja = template is None or "{{" in template or "{%" in template
        self._check_template()
        self.response_ids = self._response_ids(response, append_eos)

    def __call__(self, prompt: str) -> Encoded:
        """Encode one prompt.

        Raises:
            TypeError: `prompt` is not a string.
            ValueError: `prompt` is empty or renders to no token.
            ContextOverflowError: More than `max_length` tokens.
        """
        encoded = self.encode_any_length(prompt)
        if self.max_length is not None and len(encoded) > self.max_length:
            raise ContextOverflowError(
                f"gradsafe.encode: prompt and response take {len(encoded)} tokens "
                f"({encoded.prompt_length} + {encoded.response_length}), "
                f"max_length is {self.max_length}; shorten the prompt or score overlapping "
                f'windows of it with overflow="window"'
            )
        return encoded

    def encode_any_length(self, prompt: str) -> Encoded:
        """Encode one prompt without looking at `max_length`; raises as `__call__` otherwise."""
        _expect_text("prompt", prompt)
        if not prompt:
            raise ValueError("gradsafe.encode: expected a non-empty prompt, got ''")
        prompt_ids = self._chat_ids(prompt) if self._jinja else self._plain_ids(prompt)
        if not prompt_ids:
            raise ValueError(
                "gradsafe.encode: the rendered prompt has no token, so nothing predicts the first "
                f"response token; use a template with text of its own, for example {_EXAMPLE}"
            )
        ids = prompt_ids + self.response_ids
        assert ids[: len(prompt_ids)] == prompt_ids
        return Encoded(ids, len(prompt_ids))

    def _check_template(self) -> None:
        if self.template is None:
            if not getattr(self.tokenizer, "chat_template", None):
                raise ValueError(
                    "gradsafe.encode: the tokenizer has no chat template; "
                    f"pass template= (--template in a shell), for example {_EXAMPLE}"
                )
        elif not self._jinja:
            fields = set(_FIELD.findall(self.template))
            if "prompt" not in fields:
                raise ValueError(
                    f"gradsafe.encode: expected template= to be a Jinja chat template or a text "
                    f"that contains {{prompt}}, for example {_EXAMPLE}, got {self.template!r}"
                )
            if self.system is not None and "system" not in fields:
                raise ValueError(
                    "gradsafe.encode: system= is given, but template= has no {system} to hold it"
                )

    def _response_ids(self, response: str, append_eos: bool) -> list[int]:
        ids = self._tokenize(response, add_special_tokens=False)
        if not ids:
            raise ValueError(
                f"gradsafe.encode: response={response!r} has no token; use a text such as 'Sure'"
            )
        if append_eos:
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise ValueError(
                    "gradsafe.encode: append_eos=True, but the tokenizer has no EOS token; "
                    "set tokenizer.eos_token or use append_eos=False"
                )
            ids.append(int(eos))
        return ids

    def _chat_ids(self, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        if self.template is not None:
            options["chat_template"] = self.template
        try:
            text: Any = self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError as error:
            hint = "; leave out system= if the model knows no system role" if self.system else ""
            raise ValueError(
                f"gradsafe.encode: the chat template failed: {error}{hint}, "
                f"or pass another template=, for example {_EXAMPLE}"
            ) from error
        # The template writes BOS itself: rendering to text first avoids a second one.
        return self._tokenize(text, add_special_tokens=False)

    def _plain_ids(self, prompt: str) -> list[int]:
        # One pass over the template alone: braces inside the prompt stay as they are.
        values = {"prompt": prompt, "system": self.system or ""}
        text = _FIELD.sub(lambda match: values[match.group(1)], self.template or "")
        bare = self._tokenize(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token
        if bos and text.startswith(str(bos)):
            return bare
        ids = self._tokenize(text, add_special_tokens=True)
        # Some tokenizers close every text with EOS; the response must follow the prompt directly.
        eos = self.tokenizer.eos_token_id
        added = _trailing(ids, eos) - _trailing(bare, eos)
        return ids[: len(ids) - added] if added > 0 else ids

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        encoding = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            truncation=False,
            padding=False,
            verbose=False,
        )
        return [int(token) for token in encoding["input_ids"]]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    *,
    template: str | None = None,
    system: str | None = None,
    append_eos: bool = False,
    max_length: int | None = None,
) -> Encoded:
    """Encode one prompt and response; see `Encoder` for the options.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: User text, not empty.
        response: Response text; tokenised on its own, without special tokens.
        template: None for the tokenizer's chat template, a Jinja chat template, or a plain text
            with `{prompt}` and optionally `{system}`.
        system: System message.
        append_eos: Close the response with EOS.
        max_length: Longest allowed number of tokens.

    Returns:
        Prompt ids followed by response ids.

    Raises:
        TypeError: An argument that must be a string is not.
        ValueError: No template, an empty prompt or response, or contradicting options.
        ContextOverflowError: More than `max_length` tokens.
    """
    return Encoder(
        tokenizer,
        response,
        template=template,
        system=system,
        append_eos=append_eos,
        max_length=max_length,
    )(prompt)


def context_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return how many tokens the model can read at once, or None where nothing says.

    The smaller of the text config's `max_position_embeddings` (or `n_positions`) and the
    tokenizer's `model_max_length`; absurdly large values count as unknown.
    """
    config = text_config(model)
    limits = [
        getattr(config, "max_position_embeddings", None),
        getattr(config, "n_positions", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < _SANE_LENGTH]
    return min(known) if known else None


def _expect_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(
            f"gradsafe.encode: expected {name} to be str, got {type(value).__name__}; "
            f"convert it first (dataset columns often hold None for empty cells)"
        )


def _trailing(ids: list[int], token: int | None) -> int:
    count = 0
    while token is not None and count < len(ids) and ids[-1 - count] == token:
        count += 1
    return count

"""What a prompt may be, and how prompts become token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradsafe._checks import refuse

#: One user turn, or a conversation: dicts with "role" and "content", the last turn of a user or
#: tool. Other keys of a turn ("name", "tool_calls", ...) reach the chat template unchanged.
Prompt = str | Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Encoding:
    """How prompts and responses become token ids.

    Attributes:
        template: None for the tokenizer's chat template; a Jinja chat template (it contains `{{`
            or `{%`); or a plain text with `{prompt}` and optionally `{system}`.
        system: System message.
        append_eos: Close the response with the tokenizer's EOS token.
        overflow: What to do with a prompt longer than `max_length`: "error", or "window" for
            overlapping windows. Nothing is ever truncated.
        max_length: Longest allowed number of tokens, prompt and response together. None: no limit
            of its own; a method that holds a model then uses the model's context length.
        split_special_tokens: Tokenise special tokens that the prompt's own text holds ("</s>" typed
            by a user) as ordinary text. False reads them as special tokens, as transformers and
            serving engines do: then a detector sees what the model sees. Those of the template, of
            `system` and of the response stay special. Needs a fast tokenizer.
    """

    template: str | None = None
    system: str | None = None
    append_eos: bool = False
    overflow: Literal["error", "window"] = "error"
    max_length: int | None = None
    split_special_tokens: bool = False

    def __post_init__(self) -> None:
        for name in ("template", "system"):
            if getattr(self, name) is not None:
                expect_text(name, getattr(self, name))
        if self.overflow not in ("error", "window"):
            refuse("encode", 'overflow="error" or "window"', repr(self.overflow))
        if self.max_length is not None and self.max_length < 2:
            refuse("encode", "max_length >= 2", self.max_length)
        if not isinstance(self.split_special_tokens, bool):
            got = repr(self.split_special_tokens)
            refuse("encode", "split_special_tokens to be True or False", got, kind=TypeError)


def expect_text(name: str, value: object, kinds: str = "str") -> None:
    """Raise TypeError unless a value is a string, and ValueError for half a surrogate pair."""
    if not isinstance(value, str):
        do = "convert it first (dataset columns often hold None for empty cells)"
        refuse("encode", f"{name} to be {kinds}", type(value).__name__, do, TypeError)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        got = f"half a surrogate pair at character {error.start}"
        refuse("encode", f"{name} to be valid Unicode", got, "replace that character")


def _expect_texts(name: str, value: object) -> None:
    """Check every text inside a message."""
    if isinstance(value, str):
        expect_text(name, value)
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            _expect_texts(name, part)


def messages_of(prompt: Prompt, system: str | None = None) -> list[dict[str, Any]]:
    """Check a prompt and write it as a list of messages.

    Args:
        prompt: One user turn, or a conversation.
        system: System message to put in front.

    Raises:
        TypeError: The prompt, a turn or its content is of the wrong type.
        ValueError: An empty prompt or turn, an unknown role, no user turn, a last turn of another
            role than user or tool, or two system messages.
    """
    if isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes)):
        messages = [_message(index, turn) for index, turn in enumerate(prompt)]
        _check_roles([message["role"] for message in messages], system)
    else:
        expect_text("prompt", prompt, "str or a list of messages")
        messages = [{"role": "user", "content": prompt}]
    if prompt == "":
        refuse("encode", "a non-empty prompt", "''")
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _message(index: int, turn: object) -> dict[str, Any]:
    name = f"prompt[{index}]"
    if not isinstance(turn, Mapping) or "role" not in turn:
        expected = f'{name} to be a dict with "role" and "content"'
        refuse("encode", expected, repr(turn), kind=TypeError)
    _expect_texts(f"the text of {name}", turn)
    role, content = turn["role"], turn.get("content")
    if role not in ROLES:
        refuse("encode", f"the role of {name} to be one of {', '.join(ROLES)}", repr(role))
    if not content and role == "assistant" and turn.get("tool_calls"):
        return dict(turn)  # a turn that only calls tools has no text
    if not isinstance(content, str):
        do = "only text is supported: join the text parts of a turn, leave out images and audio"
        got = type(content).__name__
        refuse("encode", f"the content of {name} to be str", got, do, TypeError)
    if not content:
        do = "leave out turns without text"
        refuse("encode", f"the content of {name} to be non-empty", "''", do)
    return dict(turn)


def _check_roles(roles: list[str], system: str | None) -> None:
    if not roles:
        refuse("encode", "at least one message in the prompt", "none")
    if roles[-1] == "assistant":
        do = "pass the text of that turn as the response"
        refuse("encode", "the last turn of the prompt to be user or tool", "assistant", do)
    if roles[-1] == "system" or "user" not in roles:
        expected = "a prompt with a user turn whose last turn is user or tool"
        refuse("encode", expected, f"the roles {', '.join(roles)}", "add the user turn")
    if system is not None and "system" in roles:
        got = "system= and a system turn in the prompt"
        refuse("encode", "one system message", got, "leave out one of them")


def check_rendered(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raise ValueError if a chat template left a turn out of the rendered text.

    Templates strip white space, write tool results as JSON, may put the system message into another
    turn, and remove the reasoning ("<think>...</think>") of earlier turns.
    """
    position = 0
    for index, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "assistant":
            content = content.rpartition("</think>")[2]
        start = 0 if role == "system" else position
        for wanted in (content.strip(), json.dumps(content, ensure_ascii=False)[1:-1]):
            found = text.find(wanted, start)
            if found >= 0:
                break
        else:
            short = content if len(content) <= 40 else f"{content[:40]}..."
            got = f"a prompt without turn {index} ({role}: {short!r})"
            do = "pass another template=, or merge this turn into another one"
            refuse("encode", "the chat template to render every turn in order", got, do)
        position = position if role == "system" else found + len(wanted)


def turns_alone(prompt: Prompt) -> list[Prompt]:
    """Every turn of a user or tool as a user's prompt of its own, after the system message.

    Args:
        prompt: A prompt; malformed ones raise as in `messages_of`.
    """
    messages = messages_of(prompt)
    system = [turn for turn in messages if turn["role"] == "system"]
    texts = [turn["content"] for turn in messages if turn["role"] in ("user", "tool")]
    return [[*system, {"role": "user", "content": text}] for text in texts]


def last_user_turn(prompt: Prompt) -> tuple[str, Callable[[str], Prompt]]:
    """Text of the last user turn, and a function that returns the prompt with another text there.

    Args:
        prompt: A prompt that `messages_of` accepts.
    """
    if isinstance(prompt, str):
        return prompt, str
    last = max(index for index, turn in enumerate(prompt) if turn["role"] == "user")
    before, turn, behind = prompt[:last], prompt[last], prompt[last + 1 :]
    return turn["content"], lambda text: [*before, {**turn, "content": text}, *behind]

"""Rows of data sets in the formats of TRL: the prompt of a row, or its prompt and response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradsafe.models.encoding import Prompt


def prompt_of(row: Mapping[str, Any], where: str) -> Prompt:
    """The prompt of a row: its field `prompt` (text or messages), or its field `messages`.

    Args:
        row: The row.
        where: Its place, for error messages.

    Raises:
        TypeError: The field is neither text nor a list of messages.
        ValueError: The row has neither field, or the field is empty.
    """
    name = "prompt" if "prompt" in row or "messages" not in row else "messages"
    value = _field(row, name, where)
    if name == "messages" and isinstance(value, str):
        raise TypeError(f"{where}: the field 'messages' must be a list of messages, got text")
    return value


def pair(row: Mapping[str, Any], where: str) -> tuple[Prompt, str]:
    """Prompt and response of a row in one of the formats of TRL.

    These are `prompt` (text or messages) with `response` or `completion` (text, or one assistant
    message in a list), and `messages`, whose last message is the assistant's response.

    Args:
        row: The row.
        where: Its place, for error messages.

    Raises:
        TypeError: A field is of another type.
        ValueError: A field is missing or empty, or `messages` does not end with the assistant.
    """
    if "prompt" not in row and "messages" in row:
        messages = prompt_of(row, where)
        assert not isinstance(messages, str)
        *before, last = messages
        if not before or last.get("role") != "assistant":
            raise ValueError(
                f"{where}: expected 'messages' to end with a message of the assistant, the "
                f"response, after at least one other; got the last role {last.get('role')!r}"
            )
        return before, _text(last.get("content"), "the last message", where)
    name = "completion" if "response" not in row and "completion" in row else "response"
    prompt, response = prompt_of(row, where), _field(row, name, where)
    if isinstance(response, str):
        return prompt, response
    if len(response) != 1 or response[0].get("role") != "assistant":
        raise ValueError(
            f"{where}: expected {name!r} to be text or one message of the assistant, got "
            f"{len(response)} messages"
        )
    return prompt, _text(response[0].get("content"), f"the field {name!r}", where)


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    """A field that holds text or a list of messages."""
    if row.get(name) is None:
        raise ValueError(f"{where}: the field {name!r} is missing")
    value = row[name]
    if not isinstance(value, str):
        is_list = isinstance(value, Sequence)
        if not is_list or not all(isinstance(message, Mapping) for message in value):
            found = type(value).__name__
            raise TypeError(
                f"{where}: the field {name!r} must be text or a list of messages, got {found}"
            )
        if not value:
            raise ValueError(f"{where}: the field {name!r} is empty")
        return value
    return _text(value, f"the field {name!r}", where)


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{where}: {what} must be text, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{where}: {what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {what} holds half a surrogate pair") from error
    return value

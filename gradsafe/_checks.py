"""Errors about arguments in one form, and checks of configurations against their annotations."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}


def refuse(
    where: str, expected: str, got: object, do: str = "", kind: type[Exception] = ValueError
) -> NoReturn:
    """Raise the error of a wrong argument: `gradsafe.where: expected X, got Y; do Z`."""
    raise kind(f"gradsafe.{where}: expected {expected}, got {got}" + (f"; {do}" if do else ""))


def check_fields(owner: str, config: Any, least: Mapping[str, float] | None = None) -> None:
    """Checks the fields of a dataclass.

    Args:
        owner: Public name that error messages begin with.
        config: The dataclass; numbers of NumPy become Python's, and lists tuples.
        least: Smallest allowed value of fields that are numbers.

    Raises:
        TypeError: A value is of another type than its annotation says.
        ValueError: It is not one of the choices, not finite, or too small.
    """
    hints = get_type_hints(type(config))
    for name in (field.name for field in fields(config)):
        hint, value = hints[name], getattr(config, name)
        if isinstance(value, (list, tuple)):
            value = tuple(map(_built_in, value))
        check_value(owner, name, value, hint)
        if isinstance(value, Real) and not isinstance(value, bool):
            bound = (least or {}).get(name, -math.inf)
            if not bound <= float(value) < math.inf:
                limits = ["finite"] * (not isinstance(value, Integral))
                limits += [f"at least {bound}"] * (bound > -math.inf)
                limit = " and ".join(limits)
                raise ValueError(f"gradsafe.{owner}: expected {name} to be {limit}, got {value}")
        object.__setattr__(config, name, _built_in(value))


def _built_in(value: Any) -> Any:
    """A number of NumPy as one of Python; everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_value(owner: str, name: str, value: Any, hint: Any) -> None:
    """Raises as `check_fields` if a value does not have the type of an annotation."""
    if not fits(value, hint):
        kind = ValueError if isinstance(value, str) and _choices(hint) else TypeError
        raise kind(f"gradsafe.{owner}: expected {name} to be {in_words(hint)}, got {value!r}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation; a bool is no number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (tuple, list):
        return isinstance(value, origin) and all(fits(item, arguments[0]) for item in value)
    if hint in (int, float):
        number = Integral if hint is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


def in_words(hint: Any) -> str:
    """An annotation in words."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, list):
        return f"a list of {_PLURAL.get(arguments[0], 'values')}"
    if origin in (Union, types.UnionType):
        return " or ".join("None" if o is type(None) else in_words(o) for o in arguments)
    return getattr(hint, "__name__", str(hint))


def _choices(hint: Any) -> bool:
    return get_origin(hint) is Literal or any(map(_choices, get_args(hint)))

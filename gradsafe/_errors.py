"""The form of the errors about arguments."""

from __future__ import annotations

from typing import NoReturn


def refuse(
    where: str, expected: str, got: object, do: str = "", kind: type[Exception] = ValueError
) -> NoReturn:
    """Raise the error of a wrong argument: `gradsafe.where: expected X, got Y; do Z`."""
    raise kind(f"gradsafe.{where}: expected {expected}, got {got}" + (f"; {do}" if do else ""))

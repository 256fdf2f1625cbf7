"""Public names of a package, imported on first use, so that `gradsafe --help` needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, members: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the `__getattr__` and `__dir__` of a package.

    Args:
        package: Its `__name__`.
        members: Public name to the module that defines it, relative to the package; a module that
            is public itself has an empty path.
    """

    def __getattr__(name: str) -> Any:
        if name not in members:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not members[name]:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(f"{package}.{members[name]}"), name)

    def __dir__() -> list[str]:
        return sorted(members)

    return __getattr__, __dir__

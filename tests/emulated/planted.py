"""Plants bugs into copies of the real kernels and looks whether they are found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from . import emulator
from .emulator import BugFound

ORACLE = "differs from the float64 oracle"
Edit = tuple[str, str, str]  # file below csrc, text that occurs once, what replaces it


@dataclass(frozen=True)
class Bug:
    """One edit, and the pattern of the report that must come of it."""

    file: str
    old: str
    new: str
    found_by: str


@dataclass(frozen=True)
class Target:
    """Kernels to plant bugs into.

    Attributes:
        entries: Entries of csrc/tests/cases to compile.
        edits: No bugs, part of every copy: fewer instantiations, smaller tiles.
        check: Compares `run`'s results with the oracle; AssertionError where they differ.
    """

    entries: Sequence[str]
    edits: Sequence[Edit]
    check: Callable[[emulator.Runner], None]

    def passes(self, folder: Path, extra: Sequence[Edit] = ()) -> None:
        """Compiles a copy with the extra edits and checks it; raises BugFound."""
        torch.manual_seed(0)
        root = emulator.planted(folder, [*self.edits, *extra])
        program: Any = emulator.build(root, only=list(self.entries))
        try:
            self.check(functools.partial(emulator.run, program))
        except BugFound:
            raise
        except AssertionError as error:
            raise BugFound(ORACLE) from error

    def finds(self, folder: Path, bug: Bug) -> None:
        """Fails unless the bug is found, in the way it names."""
        with pytest.raises(BugFound, match=bug.found_by):
            self.passes(folder, [(bug.file, bug.old, bug.new)])

"""The parts of a benchmark case."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Alternatives = dict[str, Callable[[], object]]


class Plan(NamedTuple):
    """The calls of one case.

    Attributes:
        calls: "gradsafe" and the baselines.
        roofs: Lower bounds of any implementation: a read, a copy, a bare GEMM.
        check: Compares the result of gradsafe with the oracle and returns the largest error divided
            by its bound.
    """

    calls: Alternatives
    roofs: Alternatives
    check: Callable[[], float]

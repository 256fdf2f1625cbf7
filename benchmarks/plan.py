"""What a benchmark case consists of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Alternatives = dict[str, Callable[[], object]]


class Plan(NamedTuple):
    """The calls of one case.

    Attributes:
        calls: Ours, called "gradsafe", and the baselines.
        roofs: What no implementation can beat: a read, a copy, a bare GEMM.
        check: Compares ours with the oracle; the largest error as a share of its bound.
    """

    calls: Alternatives
    roofs: Alternatives
    check: Callable[[], float]

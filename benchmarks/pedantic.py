"""One pytest-benchmark entry per case and alternative of an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks.environment import environment


def each(cases: Sequence[Any], alternatives: Sequence[str]) -> Callable[..., Any]:
    """Parametrizes a test with every case and alternative."""

    def decorate(test: Any) -> Any:
        test = pytest.mark.parametrize("alternative", alternatives)(test)
        ids = [case.name.replace(" ", "-") for case in cases]
        return pytest.mark.parametrize("case", cases, ids=ids)(test)

    return decorate


def entry(
    benchmark: Any, build: Callable[..., Any], case: Any, alternative: str, rounds: int = 9
) -> float:
    """Times one alternative; returns the median in seconds.

    Args:
        benchmark: The fixture of pytest-benchmark.
        build: `build(case, device)` of the operator's cases: a `Plan`.
        case: The case.
        alternative: Name of a call of the plan; skipped if the plan has no such call.
        rounds: Timed calls.
    """
    plan = build(case, "cpu")
    call = {**plan.calls, **plan.roofs}.get(alternative)
    if call is None:
        pytest.skip(f"{alternative} does not apply to {case.name}")
    benchmark.group = case.name
    benchmark.extra_info.update(environment())
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)
    return float(benchmark.stats.stats.median)

"""`wgrad_moments` against the library GEMM followed by eager scoring, and torch.compile.

python -m pytest benchmarks/bench_wgrad_moments.py      one pytest-benchmark entry per alternative
python -m benchmarks.run wgrad_moments                  CSV and table, alternatives in turns
"""

from __future__ import annotations

import pytest

from benchmarks.cases_wgrad_moments import CPU_CASES, Case, build
from benchmarks.environment import environment

ALTERNATIVES = ["gradsafe", "eager", "compile", "gemm"]


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_wgrad_moments(benchmark, case: Case, alternative: str) -> None:
    calls, roofs = build(case, "cpu")
    call = {**calls, **roofs}.get(alternative)
    if call is None:
        pytest.skip(f"{alternative} does not apply to {case.name}")
    benchmark.group = case.name
    benchmark.extra_info.update(environment())
    benchmark.extra_info["flops"] = case.flops
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GFLOP/s"] = round(case.flops / seconds / 1e9, 1)

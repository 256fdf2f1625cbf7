"""`moments` against eager PyTorch, torch._foreach and torch.compile.

python -m pytest benchmarks/bench_moments.py        one pytest-benchmark entry per alternative
python -m benchmarks.run moments                    CSV and table, alternatives in turns
"""

from __future__ import annotations

import pytest

from benchmarks.cases_moments import CPU_CASES, Case, build
from benchmarks.environment import environment

ALTERNATIVES = ["gradsafe", "eager", "shared", "compile", "foreach", "read", "copy"]


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_moments(benchmark, case: Case, alternative: str) -> None:
    calls, roofs = build(case, "cpu")
    call = {**calls, **roofs}.get(alternative)
    if call is None:
        pytest.skip(f"{alternative} does not apply to {case.name}")
    benchmark.group = case.name
    benchmark.extra_info.update(environment())
    benchmark.extra_info["bytes_read"] = case.bytes_read
    benchmark.pedantic(call, rounds=9, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = round(case.bytes_read / seconds / 1e9, 2)

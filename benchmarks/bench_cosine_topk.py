"""`cosine_topk` against normalise + matmul + topk, torch.compile, and a loop over pairs.

python -m pytest benchmarks/bench_cosine_topk.py      one pytest-benchmark entry per alternative
python -m benchmarks.run cosine_topk                  CSV and table, alternatives in turns
"""

from __future__ import annotations

import pytest

from benchmarks.cases_cosine_topk import CPU_CASES, LOOP_PAIRS, Case, build
from benchmarks.environment import environment

ALTERNATIVES = ["gradsafe", "eager", "compile", "loop", "gemm", "read", "copy"]


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_cosine_topk(benchmark, case: Case, alternative: str) -> None:
    calls, roofs = build(case, "cpu")
    call = {**calls, **roofs}[alternative]
    benchmark.group = case.name
    benchmark.extra_info.update(environment())
    benchmark.extra_info["pairs"] = LOOP_PAIRS if alternative == "loop" else case.pairs
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)

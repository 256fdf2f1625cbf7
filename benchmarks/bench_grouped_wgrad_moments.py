"""`grouped_wgrad_moments` against a loop over experts with eager scoring, and a bare grouped GEMM.

python -m pytest benchmarks/bench_grouped_wgrad_moments.py   one pytest-benchmark entry each
python -m benchmarks.run grouped_wgrad_moments               CSV and table, alternatives in turns
"""

from __future__ import annotations

from benchmarks.cases_grouped_wgrad_moments import CPU_CASES, Case, build
from benchmarks.pedantic import each, entry


@each(CPU_CASES, ["gradsafe", "loop", "gemm"])
def test_grouped_wgrad_moments(benchmark, case: Case, alternative: str) -> None:
    seconds = entry(benchmark, build, case, alternative, rounds=3)
    benchmark.extra_info["flops"] = case.flops
    benchmark.extra_info["GFLOP/s"] = round(case.flops / seconds / 1e9, 1)

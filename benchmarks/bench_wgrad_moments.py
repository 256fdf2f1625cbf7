"""`wgrad_moments` against the library GEMM followed by eager scoring, and torch.compile.

python -m pytest benchmarks/bench_wgrad_moments.py      one pytest-benchmark entry per alternative
python -m benchmarks.run wgrad_moments                  CSV and table, alternatives in turns
"""

from __future__ import annotations

from benchmarks.cases_wgrad_moments import CPU_CASES, Case, build
from benchmarks.pedantic import each, entry


@each(CPU_CASES, ["gradsafe", "eager", "compile", "gemm"])
def test_wgrad_moments(benchmark, case: Case, alternative: str) -> None:
    seconds = entry(benchmark, build, case, alternative, rounds=5)
    benchmark.extra_info["flops"] = case.flops
    benchmark.extra_info["GFLOP/s"] = round(case.flops / seconds / 1e9, 1)

"""`moments` against eager PyTorch, torch._foreach and torch.compile.

python -m pytest benchmarks/bench_moments.py        one pytest-benchmark entry per alternative
python -m benchmarks.run moments                    CSV and table, alternatives in turns
"""

from __future__ import annotations

from benchmarks.cases_moments import CPU_CASES, Case, build
from benchmarks.pedantic import each, entry


@each(CPU_CASES, ["gradsafe", "eager", "shared", "compile", "foreach", "read", "copy"])
def test_moments(benchmark, case: Case, alternative: str) -> None:
    seconds = entry(benchmark, build, case, alternative)
    benchmark.extra_info["bytes_read"] = case.bytes_read
    benchmark.extra_info["GB/s"] = round(case.bytes_read / seconds / 1e9, 2)

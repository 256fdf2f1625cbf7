"""`surgery_` and `surgery_adamw_` against the PyTorch forms and a copy of as many bytes.

python -m pytest benchmarks/bench_surgery.py             one entry per alternative
python -m benchmarks.run surgery surgery_adamw           CSV and table, alternatives in turns
"""

from __future__ import annotations

from benchmarks.cases_surgery import CPU_CASES, Case, build, build_adamw
from benchmarks.pedantic import each, entry


@each(CPU_CASES, ["gradsafe", "cat", "foreach", "copy"])
def test_surgery(benchmark, case: Case, alternative: str) -> None:
    seconds = entry(benchmark, build, case, alternative)
    benchmark.extra_info["GB/s"] = round(case.bytes_moved / seconds / 1e9, 2)


@each(CPU_CASES, ["gradsafe", "fused", "two", "foreach", "copy"])
def test_surgery_adamw(benchmark, case: Case, alternative: str) -> None:
    seconds = entry(benchmark, build_adamw, case, alternative)
    benchmark.extra_info["GB/s"] = round(case.bytes_adamw / seconds / 1e9, 2)

"""Surgery, alone, with AdamW and with a subspace, against PyTorch and a copy of as many bytes.

python -m pytest benchmarks/bench_surgery.py             one entry per alternative
python -m benchmarks.run surgery surgery_adamw subspace_surgery    CSV, alternatives in turns
"""

from __future__ import annotations

from benchmarks import cases_subspace_surgery as subspace
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


@each(subspace.CPU_CASES, ["gradsafe", "each", "matmul", "surgery_", "copy"])
def test_subspace_surgery(benchmark, case: subspace.Case, alternative: str) -> None:
    seconds = entry(benchmark, subspace.build, case, alternative)
    benchmark.extra_info["GB/s"] = round(case.bytes_moved / seconds / 1e9, 2)

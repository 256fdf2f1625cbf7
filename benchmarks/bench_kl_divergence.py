"""`kl_divergence_` against eager PyTorch and torch.compile.

python -m pytest benchmarks/bench_kl_divergence.py      one pytest-benchmark entry per alternative
python -m benchmarks.run kl_divergence                  CSV and table, alternatives in turns
"""

from __future__ import annotations

from benchmarks.cases_kl_divergence import CPU_CASES, Case, build
from benchmarks.pedantic import each, entry


@each(CPU_CASES, ["gradsafe", "eager", "closed_form", "compile", "read", "copy"])
def test_kl_divergence(benchmark, case: Case, alternative: str) -> None:
    seconds = entry(benchmark, build, case, alternative)
    benchmark.extra_info["bytes_touched"] = case.bytes_touched
    benchmark.extra_info["GB/s"] = round(case.bytes_touched / seconds / 1e9, 2)

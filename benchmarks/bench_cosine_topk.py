"""`cosine_topk` against normalise + matmul + topk, torch.compile, and a loop over pairs.

python -m pytest benchmarks/bench_cosine_topk.py      one pytest-benchmark entry per alternative
python -m benchmarks.run cosine_topk                  CSV and table, alternatives in turns
"""

from __future__ import annotations

from benchmarks.cases_cosine_topk import CPU_CASES, LOOP_PAIRS, Case, build
from benchmarks.pedantic import each, entry


@each(CPU_CASES, ["gradsafe", "eager", "compile", "loop", "gemm", "read", "copy"])
def test_cosine_topk(benchmark, case: Case, alternative: str) -> None:
    entry(benchmark, build, case, alternative, rounds=5)
    benchmark.extra_info["pairs"] = LOOP_PAIRS if alternative == "loop" else case.pairs

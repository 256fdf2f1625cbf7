"""`kl_divergence_` against eager PyTorch and torch.compile.

python -m pytest benchmarks/bench_kl_divergence.py      one pytest-benchmark entry per alternative
python -m benchmarks.run kl_divergence                  CSV and table, alternatives in turns
"""

from __future__ import annotations

import pytest

from benchmarks.cases_kl_divergence import CPU_CASES, Case, build
from benchmarks.environment import environment

ALTERNATIVES = ["gradsafe", "eager", "closed_form", "compile", "read", "copy"]


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_kl_divergence(benchmark, case: Case, alternative: str) -> None:
    calls, roofs = build(case, "cpu")
    benchmark.group = case.name
    benchmark.extra_info.update(environment())
    benchmark.extra_info["bytes_touched"] = case.bytes_touched
    benchmark.pedantic({**calls, **roofs}[alternative], rounds=9, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = round(case.bytes_touched / seconds / 1e9, 2)

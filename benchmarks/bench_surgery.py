"""`surgery_` and `surgery_adamw_` against the PyTorch forms and a copy of as many bytes.

python -m pytest benchmarks/bench_surgery.py             one entry per alternative
python -m benchmarks.run surgery surgery_adamw           CSV and table, alternatives in turns
"""

from __future__ import annotations

import pytest

from benchmarks.cases_surgery import CPU_CASES, Case, build, build_adamw
from benchmarks.environment import environment


def measure(benchmark, case: Case, build_calls, alternative: str, moved: int) -> None:
    calls, roofs = build_calls(case, "cpu")
    benchmark.group = case.name
    benchmark.extra_info.update(environment())
    benchmark.pedantic({**calls, **roofs}[alternative], rounds=9, warmup_rounds=2)
    benchmark.extra_info["bytes_moved"] = moved
    benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)


@pytest.mark.parametrize("alternative", ["gradsafe", "cat", "foreach", "copy"])
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_surgery(benchmark, case: Case, alternative: str) -> None:
    measure(benchmark, case, build, alternative, case.bytes_moved)


@pytest.mark.parametrize("alternative", ["gradsafe", "fused", "two", "foreach", "copy"])
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_surgery_adamw(benchmark, case: Case, alternative: str) -> None:
    measure(benchmark, case, build_adamw, alternative, case.bytes_adamw)

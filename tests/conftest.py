"""Shared fixtures: seeds, instruction sets, and visible skips."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from gradsafe._backend import _C

# No test needs the network; a name that is no folder must not wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Files whose tests are slow; `pytest -m "not slow"` runs the others in about three minutes.
SLOW = (
    *("emulated/test_", "zoo/", "testbed/", "processes", "docs/test_scripts", "docs/test_examples"),
    *("finetuning/test_trainer_", "finetuning/test_cli_finetune", "tracing/test_build_"),
    *("ops/test_fallback", "test_gpu_run", "test_benchmark_oracle", "test_recorded", "test_cost"),
    *("serving/test_serve_process", "serving/test_cli_serve", "serving/test_clients"),
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set; skips, visibly, what the machine lacks."""
    if _C is None or request.param not in _C.cpu_isas():
        pytest.skip(f"this machine cannot run {request.param}")
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("auto")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun sets it: the library's sums may differ with the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(name in item.path.as_posix() for name in SLOW):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

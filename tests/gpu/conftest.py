"""Tests of operators need pytest and torch only, those of methods all that the package needs."""

from __future__ import annotations

import pytest
import torch
from paths import Paths

from gradsafe._backend import _C, cuda_problem


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cuda_works() -> None:
    """On a machine with a GPU a build without CUDA kernels is a failure, not a skip."""
    if torch.cuda.is_available():
        assert cuda_problem() is None
        assert _C.has_cuda_stream()


@pytest.fixture(scope="session")
def paths() -> Paths:
    """What the comparisons with the oracle ran: they call the operator inside `with paths`."""
    return Paths()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The paths of the benchmarks are compared with those of all other tests, so last."""
    items.sort(key=lambda item: item.name == "test_every_benchmark_takes_a_tested_path")

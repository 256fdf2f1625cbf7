"""Fixtures over the tiny models of `builders`."""

from __future__ import annotations

from collections.abc import Iterator

import builders
import pytest
from alignment_batches import make_batch
from torch import Tensor


@pytest.fixture
def true_float64() -> Iterator[None]:
    with builders.true_float64():
        yield


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return make_batch()

"""Fixtures over the tiny models and the tokenizer of `builders`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import FAMILIES, VOCABULARY, make_model, make_tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from gradsafe.models import Encoded
from gradsafe.models.compat import enable_checkpointing


@pytest.fixture
def build_model() -> Callable[..., nn.Module]:
    return make_model


@pytest.fixture
def checkpoint_blocks() -> Callable[[nn.Module, bool], None]:
    """Switches activation checkpointing on: `checkpoint_blocks(model, reentrant)`."""

    def switch(model: Any, reentrant: bool) -> None:
        enable_checkpointing(model, use_reentrant=reentrant)

    return switch


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def true_float64() -> Iterator[None]:
    with builders.true_float64():
        yield


@pytest.fixture
def items() -> list[Encoded]:
    """Five prompts of mixed length with responses of one to three tokens."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 1), (3, 2), (11, 1), (5, 3), (2, 1)]
    return [
        Encoded(torch.randint(3, VOCABULARY, (p + r,), generator=generator).tolist(), p)
        for p, r in shapes
    ]


@pytest.fixture
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def stories() -> Path:
    """Folder of a small trained model beside the repository."""
    folder = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"test data folder {folder.name} is not beside the repository")
    return folder

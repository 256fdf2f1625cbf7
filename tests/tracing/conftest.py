from __future__ import annotations

import pytest
import torch
from builders import VOCABULARY, make_model, make_tokenizer

from gradsafe.models import Encoded


@pytest.fixture
def items() -> list[Encoded]:
    """Samples of mixed lengths, among them a prompt of one token and a response of one token."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 3), (1, 4), (11, 1), (2, 9), (8, 6), (3, 2)]
    return [
        Encoded(torch.randint(3, VOCABULARY, (p + r,), generator=generator).tolist(), p)
        for p, r in shapes
    ]


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model():
    return make_model("llama", vocab_size=300, max_position_embeddings=96).eval()

"""The tiny model and the tokenizer that the detection tests share."""

from __future__ import annotations

import pytest
from builders import make_model, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=300, max_position_embeddings=128)

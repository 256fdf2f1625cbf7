from __future__ import annotations

import pytest
from builders import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model():
    return make_model("llama", vocab_size=300, max_position_embeddings=96).eval()

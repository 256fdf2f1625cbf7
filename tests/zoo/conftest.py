from __future__ import annotations

import pytest
from builders import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()

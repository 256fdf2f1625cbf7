"""Every causal language model of transformers, in a tiny random configuration."""

from __future__ import annotations

import pytest
import transformers
from checks import CHECKS, Result, quietly
from families import LISTED, families, make_model

NO_SIGNATURE = {
    # Its logits come from streams of their own beside the last hidden state, which reaches no loss.
    "prophetnet": "do not depend on its hidden state",
    # Its decoder puts tokens of its own in front of the text and takes them off again behind.
    "cpmant": r"expected hidden states \[B, T, d\] of CpmAntForCausalLM",
}


@pytest.fixture(autouse=True)
def silent():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("family", families())
def test_family(family, tokenizer):
    if family in LISTED:
        pytest.skip(LISTED[family])
    model = make_model(family)
    for name, check in CHECKS.items():
        if name == "trace" and family in NO_SIGNATURE:
            with pytest.raises(RuntimeError, match=NO_SIGNATURE[family]):
                check(model, tokenizer)
            continue
        with quietly():
            result = check(model, tokenizer)
        if isinstance(result, Result):
            assert result.coverage >= 0.9, result.left_out


def test_listed_families_exist():
    assert set(LISTED) <= set(families())

"""The experiment on explanations computes what it says, on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer

from benchmarks.experiments.explanation_evidence import Evidence, by_word, carried, join, words
from benchmarks.experiments.explanations import planted
from gradsafe import Detector

PROMPT = "why is it so?"


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    model = make_model("llama", vocab_size=300, max_position_embeddings=128)
    tokenizer = make_tokenizer()
    detector = Detector.fit(
        model, tokenizer, ["how to hurt", "steal it"], ["bake a cake", "sing"], progress=False
    )
    return Evidence(model, tokenizer, detector)


def test_positions_have_the_evidence_of_explain(evidence: Evidence) -> None:
    exact = evidence.detector.explain(PROMPT)
    span = exact.prompt_tokens
    want = by_word(PROMPT, exact.tokens[span], exact.token_evidence[span])
    np.testing.assert_allclose(evidence(PROMPT, 0)["position"], want, rtol=1e-3, atol=1e-6)


def test_the_gradient_is_the_slope_of_the_score(evidence: Evidence) -> None:
    (item,) = evidence.detector.encode([PROMPT]).items
    ids, start = torch.tensor([item.input_ids]), item.prompt_length
    evidence.model.double()
    try:
        inputs = evidence.embed(ids).detach()
        direction = torch.randn_like(inputs)
        slope = (evidence._pass(inputs, ids, start)["gradient"] * direction[0]).sum()
        step = 1e-5  # the norms are float32 in a float64 model, too
        up, down = (
            evidence._pass(inputs + sign * step * direction, ids, start)["position"].sum()
            for sign in (1, -1)
        )
    finally:
        evidence.model.float()
    assert float(slope) == pytest.approx(float(up - down) / (2 * step), rel=5e-3)


def test_attention_moves_evidence_and_keeps_its_sum() -> None:
    attentions = tuple(torch.rand(1, 2, 5, 5).tril().softmax(-1) for _ in range(3))
    positions = torch.randn(3, 5, dtype=torch.float64)
    assert float(carried(positions, attentions).sum()) == pytest.approx(float(positions.sum()))


def test_words() -> None:
    text = "one two  three"
    assert words(text) == ["one", " two", "  three"]
    assert join(text, [1, 2]) == "two  three"
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert by_word(text, ["on", "e", " two", "  three"], values) == [3.0, 4.0, 8.0]


def test_planted_words_are_found() -> None:
    parts = ("a b", "c", "d e")
    kinds = planted({"right": [0, 0, 1, 0, 0], "wrong": [1, 1, 0, 1, 1]}, parts)["kinds"]
    assert kinds == {
        "right": {"auroc": 1.0, "precision": 1.0},
        "wrong": {"auroc": 0.0, "precision": 0.0},
    }

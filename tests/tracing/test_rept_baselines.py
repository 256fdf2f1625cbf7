"""The baselines of `benchmarks.experiments.rept` against plain autograd, the index, and by hand."""

from __future__ import annotations

import pytest
import torch
from builders import VOCABULARY, make_model
from peft import LoraConfig, get_peft_model
from trace_samples import EXAMPLES, QUERIES, build

from benchmarks.experiments.rept_baselines import (
    SIGNATURE_METHODS,
    lora_gradients,
    measures,
    project,
    signature_scores,
    traced,
)
from gradsafe.models import collate, encode, pad_token_id, response_nll
from gradsafe.tracing import signatures

TEMPLATE = "Q: {prompt}\nA:"


@pytest.mark.parametrize("name", SIGNATURE_METHODS)
def test_scores_are_those_of_a_query(model, tokenizer, tmp_path, name):
    metric = SIGNATURE_METHODS[name]
    index = build(model, tokenizer, tmp_path / "index", template=TEMPLATE)
    hits = index.query(
        QUERIES, len(EXAMPLES), part_norm=metric.part_norm, gradient_weight=metric.gradient_weight
    )
    known, asked = (
        signatures(
            model,
            [encode(tokenizer, r["prompt"], r["response"], template=TEMPLATE) for r in rows],
            [2],
            pad_token_id(tokenizer, model),
        )[2]
        for rows in (EXAMPLES, QUERIES)
    )
    scores = signature_scores(asked, known, metric)
    torch.testing.assert_close(scores.gather(1, hits.positions), hits.scores, rtol=0, atol=2e-6)


def test_lora_gradients_are_those_of_autograd(items, tokenizer):
    base = make_model("llama", vocab_size=VOCABULARY, max_position_embeddings=96)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"))
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for weight in weights.values():  # B starts at zero, and A would have no gradient
            weight.copy_(torch.randn(weight.shape, generator=generator).double() / 4)
    found = lora_gradients(model, tokenizer, items)
    for item, row in zip(items, found, strict=True):
        loss = response_nll(model, collate([item], 0)).sum()
        expected = torch.autograd.grad(loss, list(weights.values()))
        # The order of the weights differs; squares and sorted values do not depend on it.
        flat = torch.cat([g.flatten() for g in expected])
        assert flat.abs().max() > 1e-4
        torch.testing.assert_close(
            row.double().sort().values, flat.sort().values, rtol=1e-9, atol=1e-12
        )


def test_projection_keeps_cosines_and_sees_every_column():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 5000, generator=generator)
    rows[3] = rows[2]
    rows[3, -1] += 100.0  # the last slice counts
    near, far = project([rows[:2], rows], 1024)
    exact = torch.nn.functional.normalize(rows, dim=1)
    assert ((far @ far.T) - (exact @ exact.T)).abs().max() < 6 / 1024**0.5
    assert (far[2] @ far[3]) < 0.9
    torch.testing.assert_close(near, far[:2])


def test_measures_by_hand():
    # Query 0 ranks rows 0, 1, 2, ...; query 1 the other way round. Rows 0 to 9 are poisoned.
    ranking = torch.arange(60, 0, -1.0)
    scores = torch.stack([ranking, ranking.flip(0)])
    poisoned = torch.arange(60) < 10
    found = measures(scores, poisoned)
    assert found["P@10"] == 0.5
    assert found["P@50"] == pytest.approx(0.1)  # 10 of 50 and 0 of 50
    # Pooled, equal scores are one threshold: ten hits among the first twenty.
    assert found["auPRC@10"] == pytest.approx(0.5)
    assert found["AUROC"] == pytest.approx(0.5)
    worst = sum(hit / (50 + hit) for hit in range(1, 11)) / 10
    assert found["AUPRC"] == pytest.approx((1 + worst) / 2, abs=1e-3)


def test_no_hit_is_no_precision():
    found = measures(-torch.arange(120.0)[None], torch.arange(120) >= 110)
    assert found["auPRC@10"] == found["P@10"] == found["P@50"] == 0


def test_traced_rows_have_the_best_mean_rank():
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.0, 500.0, 0.2, 0.3]])
    assert traced(scores, 2) == [1, 0]  # mean ranks 1.5, 0.5, 2, 2: not the size of a score

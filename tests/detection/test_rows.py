from __future__ import annotations

import pytest
import torch
from oracle import Oracle

from gradsafe import Detector, DetectorConfig
from gradsafe.detection.components import choose_rows

UNSAFE, SAFE = ["how to hurt", "steal it now please"], ["bake a cake", "sing"]
PROMPTS = ["hello", "a much longer prompt than others", "x"]

pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")


def fit(model, tokenizer, **options):
    options = {"reference_dtype": "float32", "row_fraction": 0.3, **options}
    return Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, **options)


@pytest.mark.parametrize(
    ("granularity", "order"),
    [
        ("tensor", "mean_then_norm"),
        ("row", "mean_then_norm"),
        ("column", "mean_then_norm"),
        ("row+column", "mean_then_norm"),
        ("layer", "mean_then_norm"),
        ("tensor", "norm_then_mean"),
        ("row", "norm_then_mean"),
        ("column", "norm_then_mean"),
    ],
)
def test_scores_are_those_of_the_kept_rows_alone(model, tokenizer, granularity, order):
    options = {"granularity": granularity, "reference_order": order, "row_fraction": 0.3}
    detector = fit(model, tokenizer, **options)
    oracle = Oracle(model, tokenizer, DetectorConfig(**options))
    oracle.rows = detector.state.rows
    unsafe, safe = oracle.reference(UNSAFE), oracle.reference(SAFE)
    expected = torch.stack([oracle.gradcoo(p, unsafe, safe) for p in PROMPTS])
    got = detector.score(PROMPTS, progress=False)
    assert got.components.shape == expected.shape
    assert torch.allclose(got.values.double(), expected.mean(1), rtol=1e-5)
    assert torch.allclose(got.components.double(), expected, rtol=1e-4)


def test_references_shrink_with_the_fraction(model, tokenizer):
    whole = fit(model, tokenizer, row_fraction=1.0)
    part = fit(model, tokenizer, row_fraction=0.25)
    assert whole.state.rows == {}
    for layer in part.layers.scored:
        shape = part.state.references["unsafe"].weights[layer.name].shape
        assert shape == (-(-layer.out_features // 4), layer.in_features)
    assert len(part.components) == len(whole.components)


def test_rows_carry_their_number_in_the_weight(model, tokenizer):
    detector = fit(model, tokenizer, granularity="row")
    layer = detector.layers.scored[0]
    wanted = [f"{layer.name}[row {row}]" for row in detector.state.rows[layer.name].tolist()]
    assert detector.components[: len(wanted)] == wanted


def test_the_draw_is_seeded_sorted_and_even(model, tokenizer):
    layers = fit(model, tokenizer).layers
    first, again, other = (choose_rows(layers, 0.25, seed) for seed in (0, 0, 1))
    assert any(not torch.equal(first[name], other[name]) for name in first)
    for layer in layers.scored:
        rows = first[layer.name]
        assert torch.equal(rows, again[layer.name])
        assert rows[0] >= 0
        assert rows[-1] < layer.out_features
        assert (rows.diff() > 0).all()
        counts = torch.bincount(rows * 4 // layer.out_features, minlength=4)
        assert counts.max() - counts.min() <= 1  # every quarter of the rows has its share
    assert choose_rows(layers, 1.0, 0) == {}
    single = choose_rows(layers, 1e-9, 3)
    assert all(len(rows) == 1 for rows in single.values())


def test_the_other_methods_take_the_rows_too(model, tokenizer):
    norm = Detector.fit(model, tokenizer, method="gradnorm", row_fraction=0.3)
    oracle = Oracle(model, tokenizer, DetectorConfig())
    oracle.rows = norm.state.rows
    gradients = [oracle.loss_and_gradients(p)[1] for p in PROMPTS]
    want = torch.stack(
        [sum(g.square().sum() for g in grads.values()).sqrt() for grads in gradients]
    )
    got = norm.score(PROMPTS, progress=False).values.double()
    assert torch.allclose(got, want, rtol=1e-5)
    cosine = fit(model, tokenizer, method="gradsafe", gap=0.1)
    assert set(cosine.components) <= set(fit(model, tokenizer, granularity="row+column").components)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(model, tokenizer, fraction):
    with pytest.raises(ValueError, match=r"row_fraction (<= 1|to be finite)"):
        fit(model, tokenizer, row_fraction=fraction)

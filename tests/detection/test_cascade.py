from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from gradsafe import Detector
from gradsafe.detection.calibration import Band, choose_band

UNSAFE, SAFE = ["how to hurt", "steal it now please"], ["bake a cake", "sing"]
PROMPTS = [f"prompt {i} " + "word " * (i % 5) for i in range(24)]
BENIGN = [f"harmless {i}" for i in range(40)]
HARMFUL = [f"harmful {i}" for i in range(40)]

pytestmark = [
    pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning"),
    pytest.mark.filterwarnings("ignore:gradsafe.calibrate"),
]


def fit(model, tokenizer, **options):
    return Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, **options)


def calibrated(model, tokenizer):
    detector = fit(model, tokenizer, method="cascade")
    detector.calibrate(BENIGN, 0.4, progress=False, unsafe_prompts=HARMFUL, max_fnr=0.2)
    return detector


def test_each_prompt_gets_the_score_of_the_stage_that_decides(model, tokenizer):
    detector = calibrated(model, tokenizer)
    got = detector.score(PROMPTS, progress=False)
    gradcoo = fit(model, tokenizer).score(PROMPTS, progress=False)
    nll = fit(model, tokenizer, method="nll").score(PROMPTS, progress=False).values
    band = detector.band
    inside = (nll >= band.low) & (nll <= band.high)
    assert 0 < inside.sum() < len(PROMPTS)
    assert torch.equal(got.backward, inside)
    assert torch.allclose(got.values[inside], gradcoo.values[inside], rtol=1e-5)
    assert torch.allclose(got.components[inside], gradcoo.components[inside], rtol=1e-4)
    assert torch.isnan(got.components[~inside]).all()
    below, above = nll < band.low, nll > band.high
    assert (got.values[below] < 0).all()
    assert (got.values[above] > 1).all()
    for part in (below, above):  # the order of the loss
        assert torch.equal(got.values[part].argsort(), nll[part].argsort())
    assert torch.allclose(got.nll, nll, rtol=1e-5)


def test_before_calibration_gradients_decide_everything(model, tokenizer):
    got = fit(model, tokenizer, method="cascade").score(PROMPTS, progress=False)
    want = fit(model, tokenizer).score(PROMPTS, progress=False)
    assert torch.equal(got.values, want.values)
    assert got.backward.all()


def test_the_order_and_the_batches_do_not_matter(model, tokenizer):
    detector = calibrated(model, tokenizer)
    there = detector.score(PROMPTS, progress=False)
    back = detector.score(PROMPTS[::-1], batch_tokens=1, progress=False)
    assert torch.allclose(there.values, back.values.flip(0), rtol=1e-5, atol=1e-6)


def test_a_saved_cascade_keeps_its_band(model, tokenizer, tmp_path):
    detector = calibrated(model, tokenizer)
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", model, tokenizer)
    assert loaded.band == detector.band
    assert torch.equal(
        loaded.score(PROMPTS, progress=False).values, detector.score(PROMPTS, progress=False).values
    )
    detector.state = dataclasses.replace(detector.state, band=Band(-math.inf, 3.0))
    detector.save(tmp_path / "detector")
    assert Detector.load(tmp_path / "detector", model, tokenizer).band == Band(-math.inf, 3.0)


def test_other_methods_report_where_gradients_were_computed(model, tokenizer):
    for method, spent in (("gradcoo", True), ("gradnorm", True), ("nll", False)):
        scores = fit(model, tokenizer, method=method).score(PROMPTS, progress=False)
        assert scores.backward.shape == (len(PROMPTS),)
        assert bool(scores.backward.all()) == bool(scores.backward.any()) == spent


def test_the_band_keeps_its_promises_on_fresh_prompts():
    generator = torch.Generator().manual_seed(0)
    cleared, called, trials = 0, 0, 300
    for _ in range(trials):
        benign = torch.randn(150, generator=generator)
        unsafe = torch.randn(150, generator=generator) + 2
        band = choose_band(benign[:-50], unsafe[:-50], max_fpr=0.05, max_fnr=0.1)
        called += int((benign[-50:] > band.high).sum())
        cleared += int((unsafe[-50:] < band.low).sum())
    # Expected: at most 5 % and 10 % on average; the sampling error of both is about 0.4 points.
    assert 0.035 < called / (50 * trials) < 0.06
    assert 0.08 < cleared / (50 * trials) < 0.11


def test_a_loss_that_separates_leaves_a_band_between_the_kinds():
    band = choose_band(
        torch.linspace(0, 1, 100), torch.linspace(5, 6, 100), max_fpr=0.05, max_fnr=0.05
    )
    assert 0.9 < band.low <= 1
    assert 5 <= band.high < 5.1
    assert band.unsure(torch.tensor([0.5, 3.0, 7.0, math.nan])).tolist() == [
        False,
        True,
        False,
        True,
    ]


def test_too_few_unsafe_prompts_clear_nothing():
    with pytest.warns(UserWarning, match="at least 99 are needed"):
        band = choose_band(torch.randn(300), torch.randn(50), max_fpr=0.05, max_fnr=0.01)
    assert band.low == -math.inf


def test_bad_input_is_refused(model, tokenizer):
    cascade = fit(model, tokenizer, method="cascade")
    with pytest.raises(ValueError, match=r"needs unsafe_prompts=\["):
        cascade.calibrate(BENIGN, 0.2, progress=False)
    with pytest.raises(ValueError, match=r"other methods take none.*'gradcoo'"):
        fit(model, tokenizer).calibrate(BENIGN, 0.2, progress=False, unsafe_prompts=HARMFUL)
    with pytest.raises(ValueError, match="0 < max_fnr < 1"):
        cascade.calibrate(BENIGN, 0.2, progress=False, unsafe_prompts=HARMFUL, max_fnr=0)
    with pytest.raises(ValueError, match='needs relative="share"'):
        fit(model, tokenizer, method="cascade", relative="difference")
    with pytest.raises(ValueError, match="method='cascade'"):
        cascade.explain("hello")


def test_a_calibration_that_fails_leaves_the_one_before(model, tokenizer):
    detector = calibrated(model, tokenizer)
    before = detector.band, detector.calibration
    with pytest.raises(ValueError, match="at least two benign_prompts"):
        detector.calibrate(BENIGN[:1], 0.4, progress=False, unsafe_prompts=HARMFUL)
    with pytest.raises(ValueError, match="empty"):
        detector.calibrate(
            [BENIGN[0], ""], 0.4, progress=False, unsafe_prompts=HARMFUL, max_fnr=0.2
        )
    assert (detector.band, detector.calibration) == before

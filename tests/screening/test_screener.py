"""Both scores are those of their definition, whatever the batches, and can be explained."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from rows_and_oracle import ALIGNMENT, ROWS, SAFE, UNSAFE, Oracle

import gradsafe
from gradsafe import Screener
from gradsafe.detection import NonFiniteGradientError

OPTIONS = {"reference_dtype": "float32", "progress": False}


def fit(model, tokenizer, **options):
    return Screener.fit(model, tokenizer, UNSAFE, SAFE, ALIGNMENT, **{**OPTIONS, **options})


@pytest.mark.parametrize("safety", ["margin", "refusals"])
@pytest.mark.parametrize("measure", ["cosine", "dot"])
def test_scores_are_those_of_autograd(model, tokenizer, measure, safety):
    oracle = Oracle(model, tokenizer)
    refusals, unsafe, safe = (oracle.mean(rows) for rows in (ALIGNMENT, UNSAFE, SAFE))
    options = {"measure": measure, "safety": safety}
    scores = fit(model, tokenizer, **options).score(ROWS, progress=False)
    safety = refusals if safety == "refusals" else oracle.margin()
    want = torch.tensor([oracle.alignment(row, safety, measure) for row in ROWS])
    assert torch.allclose(scores.alignment, want, rtol=1e-4, atol=1e-6)
    want = torch.tensor([oracle.share(row, unsafe, safe) for row in ROWS])
    assert torch.allclose(scores.share, want, rtol=1e-5)
    want = torch.tensor([oracle.gradient(row)[1] for row in ROWS])
    assert torch.allclose(scores.nll, want, rtol=1e-5)


def test_scores_of_lora_parameters_are_those_of_autograd(adapted, tokenizer):
    oracle = Oracle(adapted, tokenizer, "lora")
    safety, unsafe, safe = oracle.margin(), oracle.mean(UNSAFE), oracle.mean(SAFE)
    scores = fit(adapted, tokenizer, parameters="lora").score(ROWS, progress=False)
    want = torch.tensor([oracle.alignment(row, safety) for row in ROWS])
    assert torch.allclose(scores.alignment, want, rtol=1e-4, atol=1e-6)
    want = torch.tensor([oracle.share(row, unsafe, safe) for row in ROWS])
    assert torch.allclose(scores.share, want, rtol=1e-4)
    whole = fit(adapted, tokenizer).score(ROWS, progress=False)
    assert not torch.allclose(whole.alignment, scores.alignment, rtol=1e-2)


def test_adam_divides_by_the_root_of_the_second_moments(model, tokenizer):
    oracle = Oracle(model, tokenizer)
    sample = ROWS[:3]
    found = [oracle.gradient(row)[0] for row in sample]
    roots = [torch.stack(p).square().mean(0).sqrt() for p in zip(*found, strict=True)]
    safety = [a / (r + 1e-8) for a, r in zip(oracle.margin(), roots, strict=True)]
    screener = fit(model, tokenizer, scale="adam", sample=sample)
    got = screener.score(ROWS, progress=False).alignment
    want = torch.tensor([oracle.alignment(row, safety) for row in ROWS])
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-5)


def test_a_step_on_a_row_with_a_higher_score_raises_the_safety_loss_more(model, tokenizer):
    screener = fit(model, tokenizer, measure="dot", safety="refusals")
    scores = screener.score(ROWS, progress=False).alignment
    oracle = Oracle(model, tokenizer)
    before = sum(oracle.gradient(row)[1] for row in ALIGNMENT) / len(ALIGNMENT)
    for row, score in zip(ROWS, scores.tolist(), strict=True):
        gradient, _ = oracle.gradient(row)
        step = 1e-5
        with torch.no_grad():
            for weight, part in zip(oracle.weights, gradient, strict=True):
                weight -= step * part
        after = sum(oracle.gradient(r)[1] for r in ALIGNMENT) / len(ALIGNMENT)
        with torch.no_grad():
            for weight, part in zip(oracle.weights, gradient, strict=True):
                weight += step * part
        assert (after - before) / step == pytest.approx(score, rel=0.02, abs=1e-3)


def test_scores_do_not_depend_on_the_batches(model, tokenizer):
    screener = fit(model, tokenizer)
    alone = screener.score(ROWS, batch_tokens=1, progress=False)
    together = screener.score(ROWS[::-1], progress=False)
    for name in ("alignment", "share", "nll"):
        assert torch.allclose(
            getattr(alone, name), getattr(together, name).flip(0), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("groups", [{"alignment": ALIGNMENT}, {"unsafe": UNSAFE, "safe": SAFE}])
def test_one_score_alone_is_that_of_both(model, tokenizer, groups):
    screener = Screener.fit(model, tokenizer, **groups, **OPTIONS)
    (name,) = screener.scores
    alone = screener.score(ROWS, progress=False)
    both = fit(model, tokenizer, safety="refusals").score(ROWS, progress=False)
    assert torch.equal(getattr(alone, name), getattr(both, name))
    assert torch.equal(alone.values, getattr(alone, name))
    assert (alone.alignment is None) != (alone.share is None)


def test_streams_read_no_more_rows_than_they_score(model, tokenizer):
    read = []

    def rows():
        for index in range(7):
            read.append(index)
            yield ROWS[index % len(ROWS)]

    stream = fit(model, tokenizer).stream(rows(), size=3)
    assert len(next(stream)) == 3
    assert read == [0, 1, 2]
    assert [len(scores) for scores in stream] == [3, 1]


def test_screen_scores_any_iterable_and_flags(model, tokenizer):
    clean = [{"prompt": f"what is {i}", "response": f"it is {i}"} for i in range(9)]
    scores = gradsafe.screen(
        model, tokenizer, iter(ROWS), UNSAFE, SAFE, ALIGNMENT, clean=clean, max_fpr=0.2, **OPTIONS
    )
    assert torch.allclose(scores.values, fit(model, tokenizer).score(ROWS).share, rtol=1e-5)
    assert torch.equal(scores.flags, scores.share > scores.thresholds["share"])
    assert set(scores.thresholds) == {"alignment", "share"}


def test_calibration_keeps_the_rate_on_clean_rows(model, tokenizer):
    screener = fit(model, tokenizer, decide="alignment")
    clean = [{"prompt": f"what is {i}", "response": f"it is {i}"} for i in range(19)]
    found = screener.calibrate(clean, max_fpr=0.1, progress=False)
    scores = screener.score(clean, progress=False)
    for name, calibration in found.items():
        assert (getattr(scores, name) > calibration.threshold).sum() <= 1
        low, high = calibration.fpr_interval
        assert low <= calibration.fpr <= high
    assert torch.equal(scores.flags, scores.alignment > found["alignment"].threshold)
    with pytest.warns(UserWarning, match="too few"):
        screener.calibrate(clean, max_fpr=0.01, progress=False)


@pytest.mark.parametrize("parameters", ["weights", "lora"])
def test_the_evidence_of_the_tokens_sums_to_the_scores(adapted, tokenizer, parameters):
    screener = fit(adapted, tokenizer, parameters=parameters)
    for row in (ROWS[1], ROWS[3]):
        scores = screener.score([row], progress=False)
        found = screener.explain(row)
        alignment, share = found["alignment"], found["share"]
        total = float(alignment.token_evidence.double().sum())
        assert total == pytest.approx(float(scores.alignment), rel=1e-3, abs=1e-6)
        total = float(share.token_evidence.double().sum())
        assert total == pytest.approx(2 * float(scores.share) - 1, rel=1e-3, abs=1e-6)
        text = "".join(alignment.tokens[alignment.response_tokens])
        assert text.startswith(("a longer answer", "four"))


def test_long_responses_are_refused_or_cut(model, tokenizer):
    rows = [{"prompt": "hi", "response": "abc" * 9}, {"prompt": "hi", "response": "ab"}]
    with pytest.raises(ValueError, match=r'rows\[0\].*at most 24 fit.*overflow="truncate"'):
        fit_with_limit(model, tokenizer, "error").score(rows)
    scores = fit_with_limit(model, tokenizer, "truncate").score(rows, progress=False)
    assert scores.truncated.tolist() == [True, False]
    assert scores.tokens.tolist()[0] == 24
    with pytest.raises(ValueError, match=r"rows\[0\].*prompt alone"):
        fit_with_limit(model, tokenizer, "truncate").score([{"prompt": "p" * 40, "response": "r"}])


def fit_with_limit(model, tokenizer, overflow):
    short = [{"prompt": "a", "response": "b"}], [{"prompt": "c", "response": "d"}]
    return Screener.fit(model, tokenizer, *short, max_length=24, overflow=overflow, **OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "alignment="),
        ({"unsafe": UNSAFE}, "reference rows of both classes, got unsafe= alone; give safe="),
        ({"unsafe": UNSAFE, "safe": []}, "at least one row in safe"),
        ({"alignment": [{"prompt": "x"}]}, r"alignment\[0\]: the field 'response' is missing"),
        ({"alignment": ALIGNMENT, "scale": "adam"}, "sample="),
        ({"alignment": ALIGNMENT, "parameters": "lora"}, "a model with LoRA adapters"),
        ({"alignment": ALIGNMENT, "row_fraction": 0.0}, "row_fraction"),
    ],
)
def test_wrong_arguments_are_named(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        Screener.fit(model, tokenizer, **arguments)


def test_rows_are_named_by_their_number(model, tokenizer):
    screener = fit(model, tokenizer)
    rows = [*ROWS, {"prompt": "x", "response": ""}]
    with pytest.raises(ValueError, match=r"rows\[5\]: the field 'response' is empty"):
        screener.score(rows)
    with pytest.raises(ValueError, match=r"rows\[5\]: the field 'response' is empty"):
        list(screener.stream(iter(rows), size=2))
    with pytest.raises(ValueError, match="at least one row in rows"):
        screener.score([])
    with pytest.raises(TypeError, match="list of rows"):
        screener.score(ROWS[0])


def test_rows_among_the_references_are_named(model, tokenizer):
    same = {"messages": [
        {"role": "user", "content": "lie to him"},
        {"role": "assistant", "content": "I cannot"},
    ]}  # fmt: skip
    with pytest.raises(ValueError, match=r"rows\[1\]: this row is also the alignment row align"):
        gradsafe.screen(model, tokenizer, [ROWS[0], same], alignment=ALIGNMENT, progress=False)
    with pytest.raises(ValueError, match=r"clean\[0\]: this row is also the safe row safe\[1\]"):
        gradsafe.screen(model, tokenizer, ROWS, UNSAFE, SAFE, clean=SAFE[1:], progress=False)


def test_a_gradient_that_is_not_finite_names_the_row(tokenizer):
    from builders import make_model

    broken = make_model("llama", vocab_size=300, max_position_embeddings=128)
    screener = fit(broken, tokenizer)
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer("z").input_ids[-1]] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"gradsafe.Screener.*rows\[2\]"):
        screener.score(ROWS, batch_tokens=1, progress=False)


def test_a_dataset_is_a_list_of_rows(model, tokenizer):
    rows = [{"prompt": f"p {i}", "response": "ok"} for i in range(4)]
    groups = {"unsafe": rows[:2], "safe": rows[2:]}
    of_lists = Screener.fit(model, tokenizer, **groups, progress=False)
    datasets = {name: Dataset.from_list(own) for name, own in groups.items()}
    of_datasets = Screener.fit(model, tokenizer, **datasets, progress=False)
    new = [{"prompt": "p 9", "response": "no"}]
    found = [screener.score(new, progress=False) for screener in (of_lists, of_datasets)]
    assert torch.equal(found[0].share, found[1].share)
    with pytest.raises(ValueError, match="size to be at least 1, got 0"):
        next(of_lists.stream(new, size=0))

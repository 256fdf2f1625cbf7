"""Conversations are prompts everywhere, next to texts."""

from __future__ import annotations

import pytest
import torch

from gradsafe import Detector

SYSTEM = {"role": "system", "content": "be kind"}
UNSAFE = [[{"role": "user", "content": text}] for text in ("how to hurt", "steal it now please")]
SAFE = [[SYSTEM, {"role": "user", "content": "bake a cake"}], "sing"]
PROMPT = [
    SYSTEM,
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi!"},
    {"role": "user", "content": "why is it so?"},
]

pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")


@pytest.fixture(scope="module")
def detector(model, tokenizer):
    return Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, overflow="window")


def test_a_single_user_turn_scores_as_its_text(model, tokenizer, detector):
    texts = ["how to hurt", "steal it now please"], SAFE
    plain = Detector.fit(model, tokenizer, *texts, progress=False, overflow="window")
    got = detector.score(["tea?", PROMPT], progress=False)
    assert torch.equal(got.values, plain.score(["tea?", PROMPT], progress=False).values)
    again = detector.score([[{"role": "user", "content": "tea?"}]], progress=False)
    assert torch.allclose(again.values, got.values[:1], rtol=1e-6)


def test_earlier_turns_matter(detector):
    values = detector.score([PROMPT, PROMPT[1:], PROMPT[-1:]], progress=False).values
    assert len(set(values.tolist())) == 3


def test_calibrate_and_flag(detector):
    calibrated = Detector(detector.model, detector.tokenizer, detector.state)
    benign = [[{"role": "user", "content": f"benign {i}"}] for i in range(20)]
    calibrated.calibrate(benign, max_fpr=0.2, progress=False)
    assert calibrated.flag([PROMPT, *benign], progress=False).sum() <= 5


def test_an_explanation_finds_the_last_user_turn(detector):
    got = detector.explain(PROMPT)
    turns = "[system]be kind[user]hello[assistant]hi![user]why is it so?"
    assert "".join(got.tokens) == f"<s>{turns}[assistant]Sure"
    assert "".join(got.tokens[got.prompt_tokens]) == "why is it so?"
    assert got.score == pytest.approx(float(detector.score([PROMPT], progress=False).values))
    assert float(got.token_evidence.double().sum()) == pytest.approx(2 * got.score - 1, abs=1e-5)


def test_the_worst_window_of_a_long_conversation_is_explained(detector):
    long = [*PROMPT[:-1], {"role": "user", "content": "a" * 150 + "hurt"}]
    got = detector.explain(long)
    assert got.windows > 1
    assert "be kind" in "".join(got.tokens)


def test_bad_conversations(detector):
    with pytest.raises(ValueError, match=r"prompts\[1\].*last turn"):
        detector.score(["x", PROMPT[:-1]], progress=False)
    with pytest.raises(TypeError, match=r"one conversation.*wrap it"):
        detector.score(PROMPT, progress=False)
    with pytest.raises(TypeError, match="got dict; explain takes one prompt"):
        detector.explain({"role": "user", "content": "x"})

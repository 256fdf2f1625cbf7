"""The experiments' single pass gives every detector's own scores."""

from __future__ import annotations

import pytest
import torch
from builders import make_model, make_tokenizer

from benchmarks.experiments.detection_features import Together, variants

PROMPTS = ["hello", "a much longer prompt than others", "x", "why is it so"]
FORMS = {
    "tensor": {},
    "row": {"granularity": "row"},
    "column": {"granularity": "column"},
    "row+column": {"granularity": "row+column"},
    "layer": {"granularity": "layer"},
    "difference": {"relative": "difference", "normalize": False},
}


@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_each_detector():
    model = make_model("llama", vocab_size=300, max_position_embeddings=128)
    tokenizer = make_tokenizer()
    detectors = {}
    for style, unsafe, safe in (
        ("a", ["how to hurt"], ["bake a cake", "sing"]),
        ("b", ["steal it now", "x"], ["tea?"]),
        ("c", ["no"], ["yes"]),  # six references: more than one call of the operator takes
    ):
        detectors |= variants(model, tokenizer, style, (unsafe, safe), FORMS)
    references = (["how to hurt"], ["sing"])
    detectors |= variants(model, tokenizer, "d", references, {"tensor": {}}, unsigned=False)
    found = Together(detectors)(PROMPTS)
    for name, detector in detectors.items():
        scores = detector.score(PROMPTS, progress=False)
        assert torch.equal(torch.from_numpy(found[name]), scores.values), name
        if detector.config.granularity == "tensor":
            assert torch.equal(torch.from_numpy(found[f"parts {name}"]), scores.components)
    assert torch.equal(torch.from_numpy(found["nll"]), scores.nll)
    assert found["hidden"].shape == (len(PROMPTS), 1, model.config.hidden_size)

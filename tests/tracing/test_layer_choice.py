from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from builders import make_model
from torch.nn import functional
from trace_samples import EXAMPLES, build

from gradsafe import TraceIndex
from gradsafe.models import encode
from gradsafe.tracing import choose_layer, layer_choice, similarity_curve


def plain_curve(model, items):
    """cos(h_i, h_{i+1}), i from 1 to L - 1, one prompt at a time."""
    curves = []
    for item in items:
        prompt = torch.tensor([item.input_ids[: item.prompt_length]])
        with torch.no_grad():
            states = model(prompt, output_hidden_states=True).hidden_states
        last = [state[0, -1].double() for state in states]
        curves.append(
            [float(functional.cosine_similarity(a, b, dim=0)) for a, b in pairwise(last[1:])]
        )
    return torch.tensor(curves, dtype=torch.float64).mean(0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_curve_does_not_depend_on_batches(family, items):
    model = make_model(family).eval()
    exact = plain_curve(model, items)
    for budget in (1, 30, 4096):
        found = similarity_curve(model, items, 0, budget)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("curve", "auto", "lower"),
    [
        ([0.9, 0.2, 0.8, 0.95, 0.1], 3, 2),  # the last pair is no candidate
        ([0.1, 0.9, 0.9, 0.9, 0.9], 2, 1),
        ([0.9, 0.9, 0.9, 0.1, 0.9], 5, 4),
        ([0.2, 0.9, 0.2, 0.9, 0.9], 6, 6),  # no unique minimum: the last layer
        ([0.5], 2, 2),  # two blocks have no candidate
    ],
)
def test_the_least_similar_pair_decides(monkeypatch, model, items, curve, auto, lower):
    seen: list[int] = []

    def given(model, probes, pad_id, batch_tokens):
        seen.append(len(probes))
        return torch.tensor(curve, dtype=torch.float64)

    monkeypatch.setattr(layer_choice, "similarity_curve", given)
    assert choose_layer(model, items, 0).layer == auto
    assert choose_layer(model, items, 0, "auto-lower").layer == lower
    assert choose_layer(model, items, 0, "auto-single").layer == auto
    assert choose_layer(model, items, 0).curve == curve
    assert seen == [len(items), len(items), 1, len(items)]


def test_the_first_quarter_is_left_out(monkeypatch, model, items):
    """The curve of SmolLM2-135M, coarsely: a large step at the start, and one in the last third."""
    curve = [0.67, *[0.96] * 22, 0.88, *[0.97] * 4, 0.38]
    monkeypatch.setattr(
        layer_choice, "similarity_curve", lambda *_: torch.tensor(curve, dtype=torch.float64)
    )
    assert choose_layer(model, items, 0).layer == 25
    assert choose_layer(model, items, 0, "auto-lower").layer == 24
    assert choose_layer(model, items, 0, "auto-single").layer == 2  # as published


def test_an_index_keeps_the_curve_of_its_choice(tokenizer, tmp_path):
    model = make_model("llama", vocab_size=300, num_hidden_layers=5).eval()
    index = build(model, tokenizer, tmp_path / "a", EXAMPLES[:9], layer="auto")
    probes = [encode(tokenizer, e["prompt"], e["response"]) for e in EXAMPLES[:9]]
    exact = plain_curve(model, probes)
    torch.testing.assert_close(torch.tensor(index.layer_curve).double(), exact, rtol=0, atol=1e-5)
    assert index.layer == int(exact[:-1].argmin()) + 2
    loaded = TraceIndex.load(tmp_path / "a", model, tokenizer)
    assert (loaded.layer, loaded.layer_curve) == (index.layer, index.layer_curve)
    build(model, tokenizer, tmp_path / "a", EXAMPLES[:9], layer="auto")
    with pytest.raises(ValueError, match="expected the layer"):
        build(model, tokenizer, tmp_path / "a", EXAMPLES[:9], layer="auto-lower")


def test_bad_rules_are_refused(model, items):
    with pytest.raises(ValueError, match="expected a rule"):
        choose_layer(model, items, 0, "last")
    with pytest.raises(ValueError, match="at least one probe"):
        choose_layer(model, [], 0)

from __future__ import annotations

import pytest
import torch
from builders import make_model, make_tokenizer
from signature_oracle import hidden_and_gradients
from trace_samples import EXAMPLES, QUERIES, build

from gradsafe.models import encode, token_texts
from gradsafe.tracing import similarity_curve
from gradsafe.tracing.hits import token_influence, unit_gradients


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_influence_equals_the_definition(family, layer, tokenizer):
    model = make_model(family, vocab_size=300).eval()
    rows = {}
    for name, sample in (("train", EXAMPLES[7]), ("test", QUERIES[1])):
        item = encode(tokenizer, sample["prompt"], sample["response"])
        _, gradients = hidden_and_gradients(model, item)
        exact = gradients[layer][item.prompt_length - 1 : -1]
        exact = exact / exact.norm(dim=1, keepdim=True)
        rows[name] = unit_gradients(model, tokenizer, item, layer)
        torch.testing.assert_close(rows[name], exact, rtol=0, atol=1e-5)
    influence = token_influence(rows["train"], rows["test"])
    pairs = rows["train"] @ rows["test"].T
    torch.testing.assert_close(influence, pairs.sum(1))
    assert (influence.abs() <= len(rows["test"]) + 1e-9).all()
    swapped = token_influence(rows["test"], rows["train"])
    torch.testing.assert_close(influence.sum(), swapped.sum())


def test_a_token_without_gradient_has_no_influence(monkeypatch, model, tokenizer):
    from gradsafe.tracing import hits
    from gradsafe.tracing.response_pass import LayerView

    class Pass:
        def __init__(self, *arguments):
            pass

        def views(self, items):
            gradients = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
            return {2: LayerView(torch.zeros(1, 2), gradients)}

    monkeypatch.setattr(hits, "SignaturePass", Pass)
    rows = unit_gradients(model, tokenizer, encode(tokenizer, "a", "bc"), 2)
    assert rows.tolist() == [[0.0, 0.0], [0.6, 0.8]]


def test_hits_tell_texts_and_tokens(model, tokenizer, tmp_path):
    index = build(model, tokenizer, tmp_path / "a")
    hits = index.query([EXAMPLES[4], EXAMPLES[10]], k=3)
    assert len(hits) == 2
    for query, number in ((0, 4), (1, 10)):
        prompt, response = hits.text(query, 0)
        assert response == EXAMPLES[number]["response"]
        assert EXAMPLES[number]["prompt"] in prompt
        tokens = hits.tokens(query, 0)
        assert "".join(text for text, _ in tokens) == response
        # Of the sample itself: every token is most like its own gradient.
        item = encode(tokenizer, EXAMPLES[number]["prompt"], response)
        rows = unit_gradients(model, tokenizer, item, 2)
        expected = (rows @ rows.T).sum(1)
        found = torch.tensor([value for _, value in tokens], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert found.sum() > 0
    assert hits.tokens(0, 2) == hits.tokens(0, 2)
    items = [encode(tokenizer, EXAMPLES[i]["prompt"], EXAMPLES[i]["response"]) for i in (4, 10)]
    for query, item in enumerate(items):
        assert hits.layer_curve(query) == similarity_curve(model, [item], 0).tolist()
    with pytest.raises(IndexError, match="query below 2"):
        hits.layer_curve(2)
    for query, rank in ((2, 0), (0, 3), (-1, 0)):
        with pytest.raises(IndexError, match="query below 2 and rank below 3"):
            hits.tokens(query, rank)


@pytest.mark.parametrize(
    "text", ["plain words", " led by a space", "äöü 漢字 😀", "to tot o\n\n", ""]
)
def test_pieces_join_to_the_text(text):
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)

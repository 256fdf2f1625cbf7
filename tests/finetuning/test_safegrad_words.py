"""The search of `benchmarks.experiments.safegrad_words` against plain autograd."""

from __future__ import annotations

import random

import pytest
import torch
from builders import make_model, make_tokenizer
from torch.nn import functional

from benchmarks.experiments import safegrad_words as search
from benchmarks.experiments.safegrad_methods import Settings

ROWS = [{"prompt": "ab", "response": "cde"}, {"prompt": "abcd", "response": "e"}]
ALIGNMENT = [{"prompt": "dcba", "response": "ba"}, {"prompt": "a", "response": "bcb"}]
VOCABULARY = len(make_tokenizer())
SETTINGS = Settings(learning_rate=0.02, steps=4, batch=1, alignment_batch=2)


@pytest.fixture
def products():
    model, tokenizer = make_model("llama", vocab_size=VOCABULARY), make_tokenizer()
    run = search.ObservedRun(model, tokenizer, ROWS * 2, ALIGNMENT, 0, SETTINGS)
    states = run.states([2, 4])
    assert len(states) == 2
    return search.Products(run, states, ROWS, tokenizer)


def draw(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, VOCABULARY, (count, search.WORDS), generator=generator)


def test_products_are_those_of_autograd(products):
    words = draw(3)
    found = products(words)
    for value, sequence in zip(found, words, strict=True):
        expected = 0.0
        for state in products.states:
            assert torch.stack([d.norm() for d in state.direction]).norm() == pytest.approx(1, 1e-5)
            with torch.no_grad():
                for parameter, weight in zip(products.trained, state.weights, strict=True):
                    parameter.copy_(weight)
            total = count = 0
            for row in range(len(ROWS)):
                ids, labels = (products.batch[key][row].clone() for key in ("input_ids", "labels"))
                length = int(products.batch["attention_mask"][row].sum())
                ids[length - 1 - search.WORDS : length - 1] = sequence
                answer = labels[:length] != -100
                logits = products.model(input_ids=ids[None, :length]).logits[0]
                total = total + functional.cross_entropy(
                    logits[:-1][answer[1:]], ids[:length][answer], reduction="sum"
                )
                count += int(answer.sum())
            gradients = torch.autograd.grad(total / count, products.trained)
            expected += sum(
                float((g * d).sum()) for g, d in zip(gradients, state.direction, strict=True)
            ) / len(products.states)
        assert abs(expected) > 1e-3
        assert float(value) == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_gains_foretell_the_change(products):
    words = draw(1)[0]
    gains = products.gains(words)
    every = words.repeat(search.WORDS * VOCABULARY, 1)
    places = torch.arange(search.WORDS).repeat_interleave(VOCABULARY)
    every[torch.arange(len(every)), places] = torch.arange(VOCABULARY).repeat(search.WORDS)
    change = (products(every) - products(words[None])).view(search.WORDS, VOCABULARY)
    assert gains.gather(1, words[:, None]).abs().max() == 0
    pairs = torch.stack([gains.flatten(), change.flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.8


def test_the_search_never_loses(products, monkeypatch):
    monkeypatch.setattr(search, "BEST", 40)
    words = draw(1)[0]
    better = search.improved(products, words, torch.arange(3, 50), random.Random(0))
    assert products(better[None]) > products(words[None])
    assert better.min() >= 3
    assert better.max() < 50 or (better == words)[better >= 50].all()


def test_words_follow_the_responses():
    rows = search.with_words([{"prompt": "p", "response": "r"}] * 3, [" a b", " c"])
    assert [row["response"] for row in rows] == ["r a b", "r c", "r a b"]

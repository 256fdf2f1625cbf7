from __future__ import annotations

import copy

import pytest
import torch
from sklearn.metrics import average_precision_score
from trace_samples import EXAMPLES, QUERIES, build

from gradsafe.models import encode, mean_nll
from gradsafe.tracing import Hits, auprc, leave_out_difference, recall_at_k


def make(*ids: list[str]) -> Hits:
    scores = torch.tensor([[1.0 - place / 10 for place in range(len(row))] for row in ids])
    numbers = torch.zeros_like(scores, dtype=torch.int64)
    return Hits(list(ids), scores, numbers, numbers, None, [])


def test_recall_counts_the_first_hits() -> None:
    hits = make(["a", "b", "c", "d"], ["d", "x", "a", "y"])
    assert recall_at_k(hits, {"a", "d"}, k=1) == 0.5
    assert recall_at_k(hits, {"a", "d"}, k=2) == 0.5
    assert recall_at_k(hits, {"a", "d"}) == 1.0
    assert recall_at_k(hits, [["a"], ["z"]], k=1) == 0.5
    assert recall_at_k(hits, ["a", "d"]) == 1.0  # two queries, and ids for both


def test_auprc_of_a_complete_ranking_is_that_of_scikit_learn(model, tokenizer, tmp_path) -> None:
    index = build(model, tokenizer, tmp_path / "index")
    hits = index.query(QUERIES, k=len(EXAMPLES), progress=False)
    relevant = {"s3", "s8", "s20"}
    expected = [
        average_precision_score([name in relevant for name in ids], scores)
        for ids, scores in zip(hits.ids, hits.scores, strict=True)
    ]
    assert auprc(hits, relevant) == pytest.approx(sum(expected) / len(expected))
    first = index.query(QUERIES, k=5, progress=False)
    assert auprc(first, relevant) <= auprc(hits, relevant)


def test_rows_that_were_not_found_count_as_misses() -> None:
    assert auprc(make(["a", "b"]), {"a", "z"}) == 0.5
    assert auprc(make(["a", "b"]), {"z"}) == 0.0


def test_leave_out_difference(model, tokenizer) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(3.0)
    found = leave_out_difference(model, other, tokenizer, QUERIES, batch_tokens=40)
    for query, value in zip(QUERIES, found.tolist(), strict=True):
        item = encode(tokenizer, query["prompt"], query["response"])
        losses = [float(mean_nll(m, [item], 0)) for m in (other, model)]
        assert value == pytest.approx(losses[0] - losses[1], abs=1e-4)
    assert leave_out_difference(model, model, tokenizer, QUERIES).tolist() == [0.0] * len(QUERIES)
    assert float(found.abs().max()) > 0.1


@pytest.mark.parametrize(
    ("relevant", "k", "message"),
    [
        ({"a"}, 3, "1 <= k <= 2, the hits of a query, got 3; query the index with a larger k"),
        ({"a"}, 0, "1 <= k <= 2"),
        (set(), 1, "at least one relevant row for query 0"),
        ([["a"]], 1, "2 collections, one per query, got 1 collections"),
    ],
)
def test_refused(relevant, k, message) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        recall_at_k(make(["a", "b"], ["c", "d"]), relevant, k)

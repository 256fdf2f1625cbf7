"""Approximate search: recall on clustered rows, exact scores, and what happens without FAISS."""

from __future__ import annotations

import sys

import pytest
import torch
from trace_samples import EXAMPLES, QUERIES, build

from gradsafe.tracing.matching import Metric, best_rows, feature_moments
from gradsafe.tracing.search import Search

ROWS, WIDTH = 6000, 64


class Shards:
    """An index folder as `Search` sees it, of random shards."""

    def __init__(self, rows: torch.Tensor, sizes: list[int]) -> None:
        self.present = list(rows.split(sizes))
        self.read: list[int] = []

    def signatures(self):
        yield from self.present

    def signature_rows(self, shard, rows):
        self.read += rows.tolist()
        return shard[rows]


@pytest.fixture(scope="module")
def clustered():
    """Rows around 60 centers, and queries around them."""
    generator = torch.Generator().manual_seed(5)
    centers = torch.randn(60, WIDTH, generator=generator)

    def around(count: int) -> torch.Tensor:
        places = torch.randint(60, (count,), generator=generator)
        return centers[places] + 0.5 * torch.randn(count, WIDTH, generator=generator)

    return around(ROWS), around(100)


@pytest.mark.parametrize("metric", [Metric("none"), Metric("unit", 0.05), Metric("zscore")])
def test_most_of_the_best_are_found_and_scores_are_exact(clustered, metric):
    pytest.importorskip("faiss")
    rows, queries = clustered
    shards = Shards(rows, [1500, 1, 2499, 2000])
    search = Search(shards, [0, 1500, 1501, 4000], ROWS)
    found = search.best_rows(queries, 10, metric, approximate=True)
    moments = feature_moments(shards.signatures)
    exact = best_rows(queries, shards.signatures(), ROWS // 8, metric, moments)
    recall = 0
    for query in range(len(queries)):
        places = {row: place for place, row in enumerate(exact.indices[query].tolist())}
        own = [places[row] for row in found.indices[query].tolist()]
        assert own == sorted(own)  # best first, none twice
        assert len({*own}) == 10
        assert torch.equal(found.scores[query], exact.scores[query, own])
        recall += len({*own} & {*range(10)})
    print(f"recall at 10, {metric}: {recall / 1000:.3f}")
    assert recall >= 950
    shards.read.clear()
    search.best_rows(queries[:1], 10, metric, approximate=True)
    assert len(shards.read) == 100  # nothing but the candidates


def test_a_small_index_is_searched_as_a_whole(model, tokenizer, tmp_path):
    pytest.importorskip("faiss")
    index = build(model, tokenizer, tmp_path / "a", EXAMPLES[:20])
    for _ in range(2):
        for options in ({}, {"part_norm": "unit", "gradient_weight": 0.1}):
            found = index.query(QUERIES, 12, approximate=True, **options)
            exact = index.query(QUERIES, 12, **options)
            assert found.ids == exact.ids
            assert torch.equal(found.scores, exact.scores)
        index.extend(EXAMPLES[20:], progress=False)  # what was kept of the old state is dropped
    assert found.text(0, 11) == exact.text(0, 11)


def test_windows_of_one_sample_count_once(model, tokenizer, tmp_path):
    pytest.importorskip("faiss")
    long = {"id": "long", "prompt": "x" * 100 + "why 7", "response": "so 49"}
    rows = [*EXAMPLES[:9], long, *EXAMPLES[9:]]
    index = build(model, tokenizer, tmp_path / "w", rows, overflow="window", max_length=60)
    assert index.query([long], 24, approximate=True).ids == index.query([long], 24).ids


def test_without_faiss_the_extra_is_named(model, tokenizer, tmp_path, monkeypatch):
    index = build(model, tokenizer, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("gradsafe.tracing.index.signatures", lambda *_: pytest.fail("too late"))
    with pytest.raises(ImportError, match=r"approximate=True needs FAISS: pip install 'gradsafe\["):
        index.query(QUERIES, 2, approximate=True)

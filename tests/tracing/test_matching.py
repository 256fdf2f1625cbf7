"""How many rows a query must find so that its samples are the best ones."""

from __future__ import annotations

import pytest
import torch
from builders import make_model, make_tokenizer
from trace_samples import QUERIES, build

from gradsafe.ops.cosine_topk import MAX_K, TopK
from gradsafe.tracing.matching import best_samples, largest_k, rows_needed


@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_the_best_samples_among_many_windows_are_those_of_brute_force(k):
    generator = torch.Generator().manual_seed(k)
    windows = torch.randint(1, 80, (40,), generator=generator)
    owners = torch.arange(40).repeat_interleave(windows)
    assert len(owners) - 40 > MAX_K
    # The samples with most windows come first with all of them: no fewer rows would do.
    crowded = windows[owners] + torch.rand(len(owners), generator=generator)
    for scores in (crowded, torch.rand(len(owners), generator=generator)):
        found = scores.sort(descending=True, stable=True)
        rows = rows_needed(k, owners)
        values, places = best_samples(
            TopK(found.values[None, :rows], found.indices[None, :rows]), owners, [0], 1, k
        )
        best = torch.full((40,), -1.0).scatter_reduce(0, owners, scores, "amax")
        assert torch.equal(values[0], best.sort(descending=True).values[:k])
        assert torch.equal(owners[places[0]], best.argsort(descending=True)[:k])


def test_the_largest_k_that_works_is_named():
    owners = torch.arange(3).repeat_interleave(torch.tensor([500, 523, 600]))
    assert [rows_needed(k, owners) for k in (1, 2)] == [1, 601]
    with pytest.raises(ValueError, match="expected k of at most 2 "):
        rows_needed(3, owners)
    assert [rows_needed(k, torch.arange(2000)) for k in (1, 1024)] == [1, 1024]


def test_an_index_with_more_windows_than_one_search_finds_answers():
    model = make_model("llama", vocab_size=300, max_position_embeddings=96).eval()
    tokenizer = make_tokenizer()
    rows = [{"prompt": f"{i}" + "x" * 900, "response": f"so {i}"} for i in range(45)]
    index = build(model, tokenizer, None, rows, overflow="window", max_length=40)
    assert len(index._search.owners) - len(index) > MAX_K
    hits = index.query([*QUERIES, rows[17]], 3)
    assert hits.ids[3][0] == 17
    assert all(len(set(ids)) == 3 for ids in hits.ids)


def test_largest_k_is_accepted_and_one_more_is_not() -> None:
    owners = torch.cat([torch.arange(2000), torch.tensor([5, 5, 7])]).sort().values
    largest = largest_k(owners)
    assert rows_needed(largest, owners) <= 1024
    with pytest.raises(ValueError, match=f"k of at most {largest} "):
        rows_needed(largest + 1, owners)

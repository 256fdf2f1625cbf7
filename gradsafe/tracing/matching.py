"""How similar two signatures are, and the best rows of an index."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradsafe._checks import check_fields
from gradsafe.ops.cosine_topk import MAX_K, TopK, cosine_topk, merge_topk
from gradsafe.tracing.config import PartNorm, check_weighing

# Of the gradient part, if none is given; docs/tracing.md has the measurements.
WEIGHTS = {"unit": 0.05, "zscore": 0.5}
BLOCK = 256  # rows prepared at once: limits the size of their float64 copy


@dataclass(frozen=True)
class Metric:
    """Cosine of signatures `[h ; g]` after their parts were made comparable.

    Attributes:
        part_norm: "none": as they are. This is the published procedure, which ranks by h alone
            where |h| is hundreds of times |g|. "unit": each part divided by its norm. "zscore":
            each feature minus its mean over the index, divided by its standard deviation.
        gradient_weight: w in [0, 1] for "unit" and "zscore": h is scaled by sqrt(1 - w), g by
            sqrt(w), so that "unit" gives (1 - w) cos_h + w cos_g. None for 0.05 with "unit" and
            0.5 with "zscore".

    Raises:
        TypeError: The weight is not a number.
        ValueError: An unknown `part_norm`, or a weight that is out of range or does not apply.
    """

    part_norm: PartNorm = "unit"
    gradient_weight: float | None = None

    def __post_init__(self) -> None:
        check_fields("TraceIndex", self)
        check_weighing(self.part_norm, self.gradient_weight)

    def prepare(self, rows: Tensor, moments: FeatureMoments | None) -> Tensor:
        """Make `[n, 2d]` signatures comparable by their cosine.

        A part of length zero stays zero, and so does a feature that is the same in every row of
        the index.
        """
        if self.part_norm == "none":
            return rows
        weight = self.gradient_weight
        weight = WEIGHTS[self.part_norm] if weight is None else weight
        factors = (math.sqrt(1 - weight), math.sqrt(weight))
        prepared = torch.empty(rows.shape, dtype=torch.float32)
        for part, target in zip(rows.split(BLOCK), prepared.split(BLOCK), strict=True):
            exact = part.to(torch.float64, copy=True)
            if self.part_norm == "zscore":
                assert moments is not None
                exact.sub_(moments.mean).mul_(moments.inverse_std)
            for half, factor in zip(exact.chunk(2, 1), factors, strict=True):
                if self.part_norm == "unit":
                    norms = torch.linalg.vector_norm(half, dim=1, keepdim=True)
                    half.div_(torch.where(norms > 0, norms, 1.0))
                half.mul_(factor)
            target.copy_(exact)
        return prepared


class FeatureMoments(NamedTuple):
    """Mean and 1 / standard deviation of every feature over an index, `[2d]` float64."""

    mean: Tensor
    inverse_std: Tensor


def feature_moments(shards: Callable[[], Iterable[Tensor]]) -> FeatureMoments:
    """Two passes over the signatures, in float64, one shard in memory at a time."""
    count = 0
    total: Tensor | None = None
    for rows in shards():
        count += len(rows)
        part = rows.double().sum(0)
        total = part if total is None else total + part
    assert total is not None
    mean = total / count
    squares = torch.zeros_like(mean)
    for rows in shards():
        squares += (rows.double() - mean).square_().sum(0)
    std = (squares / count).sqrt_()
    # Equal float32 values differ from their mean by float64 rounding only.
    constant = std <= 1e-12 * mean.abs()
    return FeatureMoments(mean, torch.where(constant, 0.0, 1 / std))


def best_rows(
    queries: Tensor,
    shards: Iterable[Tensor],
    k: int,
    metric: Metric,
    moments: FeatureMoments | None,
) -> TopK:
    """The k rows most similar to each of `[Q, 2d]` raw signatures, best first.

    Streams shard by shard; nothing is `[Q, N]`. Rows are numbered over all shards, and equal scores
    are in the order of these numbers.
    """
    ready = metric.prepare(queries.float(), moments).contiguous()
    found: TopK | None = None
    start = 0
    for rows in shards:
        prepared = metric.prepare(rows, moments)
        best = cosine_topk(ready, prepared, min(k, len(rows)), start)
        found = best if found is None else merge_topk([found, best], k)
        start += len(rows)
    assert found is not None
    return found


def best_samples(
    found: TopK, row_owners: Tensor, query_owners: list[int], queries: int, k: int
) -> tuple[Tensor, Tensor]:
    """Scores and rows of the best samples, `[queries, k]` each, best first.

    Samples (`row_owners`) and queries (`query_owners`) may consist of several windows, of which the
    most similar pair decides.
    """
    scores = torch.empty(queries, k, dtype=torch.float32)
    rows = torch.empty(queries, k, dtype=torch.int64)
    lists: list[list[tuple[float, int]]] = [[] for _ in range(queries)]
    for owner, values, places in zip(
        query_owners, found.scores.tolist(), found.indices.tolist(), strict=True
    ):
        lists[owner].extend(zip(values, places, strict=True))
    for query, candidates in enumerate(lists):
        candidates.sort(key=lambda pair: (-pair[0], pair[1]))
        best: dict[int, tuple[float, int]] = {}
        for score, row in candidates:
            best.setdefault(int(row_owners[row]), (score, row))
        kept = list(best.values())[:k]
        scores[query] = torch.tensor([score for score, _ in kept])
        rows[query] = torch.tensor([row for _, row in kept])
    return scores, rows


def rows_needed(k: int, row_owners: Tensor) -> int:
    """How many of the best rows are certain to include the best k samples.

    In the worst case the best rows are all windows of the k - 1 samples with the most windows, and
    one row more.
    """
    needed = _needed(row_owners)
    if needed[k - 1] > MAX_K:
        raise ValueError(
            f"gradsafe.TraceIndex.query: expected k of at most {largest_k(row_owners)} (one "
            f"search finds {MAX_K} rows, and samples that were cut into windows have several), got "
            f"{k}"
        )
    return int(needed[k - 1])


def largest_k(row_owners: Tensor) -> int:
    """The largest k of a query."""
    return int((_needed(row_owners) <= MAX_K).sum())


def _needed(row_owners: Tensor) -> Tensor:
    windows = row_owners.unique(return_counts=True)[1].sort(descending=True).values
    return 1 + windows.cumsum(0) - windows

"""Finds the rows of an index most similar to a query: exactly, or among candidates."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import torch
from torch import Tensor

from gradsafe.ops.cosine_topk import TopK, cosine_topk
from gradsafe.tracing.approximate import Candidates
from gradsafe.tracing.folder import IndexFolder
from gradsafe.tracing.matching import FeatureMoments, Metric, best_rows, feature_moments

TOGETHER = 64  # queries whose candidates are in memory at once


class Search:
    """One state of an index, and what several queries of it need; nothing else is kept in memory.

    Args:
        folder: The index.
        starts: First row of each complete shard.
        rows: Rows of all of them.
    """

    def __init__(self, folder: IndexFolder, starts: list[int], rows: int) -> None:
        self._folder = folder
        self._starts = starts
        self._rows = rows
        self._moments: FeatureMoments | None = None
        self._candidates: dict[Metric, Candidates] = {}

    def best_rows(self, queries: Tensor, k: int, metric: Metric, approximate: bool) -> TopK:
        """The k rows most similar to each of `[Q, 2d]` raw signatures, best first.

        Args:
            queries: Raw signatures.
            k: Rows per query.
            metric: How to compare.
            approximate: Compare with the candidates of FAISS only; the scores are exact.

        Raises:
            ImportError: FAISS is asked for and not installed.
        """
        if metric.part_norm == "zscore" and self._moments is None:
            self._moments = feature_moments(self._folder.signatures)
        if not approximate:
            return best_rows(queries, self._folder.signatures(), k, metric, self._moments)
        if metric not in self._candidates:
            self._candidates[metric] = Candidates(lambda: self._prepared(metric), self._rows)
        ready = metric.prepare(queries.float(), self._moments).contiguous()
        found = []
        for part in ready.split(TOGETHER):
            proposed = self._candidates[metric](part, k)
            union = torch.cat(proposed).unique()
            rows = metric.prepare(self._read(union), self._moments)
            for query, own in zip(part, proposed, strict=True):
                places = torch.searchsorted(union, own)
                scores, indices = cosine_topk(query[None], rows[places], k)
                found.append((scores, own[indices]))
        return TopK(*(torch.cat(column) for column in zip(*found, strict=True)))

    def shard_of(self, row: int) -> tuple[int, int]:
        """Number of the complete shard that holds a row, and the row's place in it."""
        shard = bisect.bisect_right(self._starts, row) - 1
        return shard, row - self._starts[shard]

    def _prepared(self, metric: Metric) -> Iterator[Tensor]:
        for rows in self._folder.signatures():
            yield metric.prepare(rows, self._moments)

    def _read(self, rows: Tensor) -> Tensor:
        """Raw signatures of ascending row numbers; no other row is read."""
        parts = []
        present = self._folder.present
        shards = torch.bucketize(rows, torch.tensor(self._starts), right=True) - 1
        for shard in shards.unique().tolist():
            places = rows[shards == shard] - self._starts[shard]
            parts.append(self._folder.signature_rows(present[shard], places))
        return torch.cat(parts)

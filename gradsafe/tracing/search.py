"""Finds the rows of an index most similar to a query: exactly, or among candidates."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from gradsafe.models import Encoded
from gradsafe.ops.cosine_topk import TopK, cosine_topk
from gradsafe.tracing.approximate import Candidates
from gradsafe.tracing.examples import Id
from gradsafe.tracing.folder import IndexFolder
from gradsafe.tracing.matching import FeatureMoments, Metric, best_rows, feature_moments

# What all queries share (FAISS files, moments) is made by one thread, and the others wait.
_making = threading.RLock()

TOGETHER = 64  # queries whose candidates are in memory at once


class Search:
    """The complete shards of an index at one time, and what several queries of them need.

    Attributes:
        ids: Number of each sample to its id, in order.
        owners: `[N]` number of the sample of each row.
    """

    def __init__(self, folder: IndexFolder) -> None:
        self._folder = folder
        self._shards = folder.present
        self._starts: list[int] = []
        self._moments: FeatureMoments | None = None
        self._candidates: dict[Metric, Candidates] = {}
        self.ids: dict[int, Id] = {}
        owners = [torch.empty(0, dtype=torch.int64)]
        for shard in self._shards:
            ids, rows = folder.ids(shard)
            self.ids.update(enumerate(ids, shard.first))
            self._starts.append(sum(map(len, owners)))
            owners.append(rows)
        self.owners = torch.cat(owners)

    def best_rows(
        self,
        queries: Tensor,
        k: int,
        metric: Metric,
        approximate: bool = False,
        progress: bool = False,
    ) -> TopK:
        """The k rows most similar to each of `[Q, 2d]` raw signatures, best first.

        With `approximate` these are compared with FAISS's candidates only; scores are exact. The
        progress bar is that of an index of FAISS that has to be built.
        """
        candidates = self.candidates(metric, progress) if approximate else None
        moments = self._moments_of(metric)
        if candidates is None:
            return best_rows(queries, self._signatures(), k, metric, moments)
        found = []
        for part in queries.float().split(TOGETHER):
            proposed = candidates(part, k)
            union = torch.cat(proposed).unique()
            rows = metric.prepare(self._read(union), moments)
            ready = metric.prepare(part, moments).contiguous()
            for query, own in zip(ready, proposed, strict=True):
                places = torch.searchsorted(union, own)
                scores, indices = cosine_topk(query[None], rows[places], k)
                found.append((scores, own[indices]))
        return TopK(*(torch.cat(column) for column in zip(*found, strict=True)))

    def candidates(self, metric: Metric, progress: bool) -> Candidates:
        """FAISS's candidates for a metric: those that are saved, with the rows they lack."""
        if metric not in self._candidates:
            with _making:
                if metric not in self._candidates:
                    found = Candidates(self._folder, metric, len(self.owners), progress)
                    self._moments = found.moments or self._moments
                    self._candidates[metric] = found
        return self._candidates[metric]

    def is_blank(self, metric: Metric) -> bool:
        """Whether every score of `best_rows` was 0: no feature differs between the rows."""
        moments = self._moments if metric.part_norm == "zscore" else None
        return moments is not None and not moments.inverse_std.any()

    def item(self, row: int) -> Encoded:
        """Token ids of a row."""
        shard = bisect.bisect_right(self._starts, row) - 1
        return self._folder.item(self._shards[shard], row - self._starts[shard])

    def _moments_of(self, metric: Metric) -> FeatureMoments | None:
        if metric.part_norm == "zscore" and self._moments is None:
            with _making:
                self._moments = self._moments or feature_moments(self._signatures)
        return self._moments

    def _signatures(self) -> Iterator[Tensor]:
        return self._folder.signatures(self._shards)

    def _read(self, rows: Tensor) -> Tensor:
        """Raw signatures of ascending row numbers; no other row is read."""
        parts = []
        shards = torch.bucketize(rows, torch.tensor(self._starts), right=True) - 1
        for shard in shards.unique().tolist():
            places = rows[shards == shard] - self._starts[shard]
            parts.append(self._folder.signature_rows(self._shards[shard], places))
        return torch.cat(parts)

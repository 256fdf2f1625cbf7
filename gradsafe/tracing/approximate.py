"""Approximate search with FAISS: it proposes rows, and their exact cosines decide."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

PER_ROW = 10  # candidates for each row that is asked for
LEAST = 100  # candidates
TRAINING = 64  # rows per list that the lists are learned from
PROBED = 8  # one list of so many is searched


def load_faiss() -> Any:
    """The module.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "gradsafe.TraceIndex.query: approximate=True needs FAISS: pip install "
            "'gradsafe[faiss]', or leave it out for the exact search"
        ) from error


class Candidates:
    """Rows that may be the most similar ones, from an inverted file in memory.

    sqrt(N) lists of rows, of which an eighth is searched per query; a value takes one byte, so the
    rows take a quarter of their size on disk.

    Args:
        shards: `[n, D]` rows of each shard, whose cosine is to be found; called twice.
        rows: How many there are.
    """

    def __init__(self, shards: Callable[[], Iterable[Tensor]], rows: int) -> None:
        faiss = load_faiss()
        lists = max(1, math.isqrt(rows))
        every = max(1, rows // (TRAINING * lists))
        sample = torch.cat(list(_every(shards(), every)))
        width = sample.shape[1]
        self._index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(width),
            width,
            lists,
            faiss.ScalarQuantizer.QT_8bit,
            faiss.METRIC_INNER_PRODUCT,
        )
        self._index.cp.min_points_per_centroid = 1
        self._index.train(normalize(sample).contiguous().numpy())
        for part in shards():
            self._index.add(normalize(part).contiguous().numpy())
        self._rows = rows
        self._lists = lists

    def __call__(self, queries: Tensor, needed: int) -> list[Tensor]:
        """Row numbers for each of `[Q, D]` queries, ascending, at least `needed` of them."""
        count = min(max(PER_ROW * needed, LEAST), self._rows)
        ready = normalize(queries).contiguous().numpy()
        probed = min(self._lists, max(8, self._lists // PROBED))
        while True:
            self._index.nprobe = probed
            found = [torch.from_numpy(row[row >= 0]) for row in self._index.search(ready, count)[1]]
            if probed == self._lists or min(map(len, found)) >= needed:
                return [rows.sort().values for rows in found]
            probed = min(self._lists, 2 * probed)


def _every(shards: Iterable[Tensor], step: int) -> Iterator[Tensor]:
    """Every step-th row, counted over all shards."""
    first = 0
    for rows in shards:
        yield rows[-first % step :: step].clone()
        first += len(rows)

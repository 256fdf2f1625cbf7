"""Peak memory of queries against a shard on disk: matching_memory.py FOLDER; prints bytes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from gradsafe.models import Encoded
from gradsafe.tracing.folder import IndexFolder, Shard
from gradsafe.tracing.matching import Metric
from gradsafe.tracing.search import Search

ROWS, WIDTH, QUERIES = 60_000, 16, 400


def peak() -> int:
    """Most memory so far, of this process since its start."""
    (size,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(size) * 1024


metadata = {"shard_samples": ROWS, "parts": [{"examples": "", "count": ROWS}]}
folder = IndexFolder.create(Path(sys.argv[1]), metadata)
(plan,) = folder.plan
items = [Encoded([1, 2], 1)] * ROWS
shard = Shard(torch.randn(ROWS, WIDTH), torch.arange(ROWS), list(range(ROWS)), items)
folder.list_shards({plan.name: folder.write_shard(plan, shard)})
queries = torch.randn(2 * QUERIES, WIDTH)
search = Search(folder)
found = [peak()]
for count in (QUERIES, 2 * QUERIES):
    search.best_rows(queries[:count], 10, Metric("zscore"), approximate=False)
    found.append(peak())
print(*found)

"""Queries of an index of signatures on disk, compared with the published loop; writes a CSV.

    python -m benchmarks.bench_matching              500 queries, 5,000 signatures of 2 x 1024
    python -m benchmarks.bench_matching --dry-run    tiny, nothing written

The published procedure, rewritten: two Python loops, one NumPy cosine per pair, one sort per query.
It is timed over all pairs with the signatures in memory, while gradsafe reads the shards at every
call. Signatures are drawn around random centers, with gradients 500 times smaller than hidden
states. Recall is relative to the exact search with the same norm.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases_cosine_topk import pair_cosine
from benchmarks.table import markdown, write_csv
from benchmarks.timing import compare
from gradsafe.models import Encoded
from gradsafe.tracing.folder import IndexFolder, Shard
from gradsafe.tracing.matching import Metric
from gradsafe.tracing.search import Search

RESULTS = Path(__file__).resolve().parent / "results"
SHARD = 1024
COLUMNS = [
    ("case", "case"),
    ("alternative", "alternative"),
    ("ms", "ms"),
    ("x", "vs published loop"),
    ("recall", "recall"),
]
LOOP = "published loop"


def signatures(a: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Rows and queries `[n, 2d]`."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(a.centers, 2 * a.hidden, generator=generator)

    def draw(count: int) -> Tensor:
        places = torch.randint(a.centers, (count,), generator=generator)
        rows = centers[places] + torch.randn(count, 2 * a.hidden, generator=generator)
        rows[:, a.hidden :] /= 500
        return rows

    return draw(a.rows), draw(a.queries)


def write_index(path: Path, rows: Tensor) -> IndexFolder:
    """An index of these signatures."""
    part = {"examples": "", "count": len(rows)}
    folder = IndexFolder.create(path, {"shard_samples": SHARD, "parts": [part]})
    for plan in folder.plan:
        numbers = range(plan.first, plan.first + plan.count)
        items = [Encoded([1, 2], 1)] * plan.count
        shard = Shard(rows[numbers], torch.tensor(numbers), list(numbers), items)
        folder.list_shards({plan.name: folder.write_shard(plan, shard)})
    return folder


def published(queries: np.ndarray, rows: np.ndarray, k: int) -> list[list[int]]:
    """The k best rows of each query."""
    found = []
    for query in queries:
        scores = [pair_cosine(query, row) for row in rows]
        found.append(sorted(range(len(rows)), key=scores.__getitem__, reverse=True)[:k])
    return found


def recall(found: Tensor, exact: Tensor) -> float:
    """Share of the exact hits that were found."""
    pairs = zip(found.tolist(), exact.tolist(), strict=True)
    return sum(len({*a} & {*b}) for a, b in pairs) / exact.numel()


def measure(a: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """All alternatives."""
    rows, queries = signatures(a)
    folder = write_index(path, rows)

    def ours(metric: Metric, approximate: bool = False) -> Callable[[], Tensor]:
        search = Search(folder)
        return lambda: search.best_rows(queries, a.k, metric, approximate).indices

    norms = {"none": Metric("none"), "unit": Metric("unit", 0.5), "zscore": Metric("zscore")}
    calls: dict[str, Callable[[], Any]] = {
        f"exact, {name}": ours(metric) for name, metric in norms.items()
    }
    best: dict[str, Tensor] = {
        name: call() for name, call in zip(norms, calls.values(), strict=True)
    }
    if importlib.util.find_spec("faiss"):
        calls |= {f"approximate, {name}": ours(norms[name], True) for name in ("none", "zscore")}
    else:
        print("FAISS is not installed: no approximate search")
    arrays = queries.numpy(), rows.numpy()
    looped: list[list[list[int]]] = []
    for call in calls.values():
        call()
    calls[LOOP] = lambda: looped.append(published(*arrays, a.k))
    timings = compare(calls, "cpu", a.rounds, 0)
    loop = timings[LOOP]
    result = []
    for name, call in calls.items():
        found = torch.tensor(looped[0]) if name == LOOP else call()
        exact = best["none" if name == LOOP else name.split()[-1]]
        result.append(
            {
                "case": f"{a.queries} x {a.rows}, 2 x {a.hidden}, k {a.k}",
                "alternative": name,
                "ms": round(timings[name].p50 / 1e3, 1),
                "x": round(loop.p50 / timings[name].p50, 1),
                "recall": round(recall(found, exact), 4),
                "p20_ms": round(timings[name].p20 / 1e3, 1),
                "p80_ms": round(timings[name].p80 / 1e3, 1),
            }
        )
    return result


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--centers", type=int, default=100)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    a = parser.parse_args()
    if a.dry_run:
        a.queries, a.rows, a.hidden, a.rounds = 3, 1100, 4, 1
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(a, Path(folder) / "index")
    print(markdown(rows, COLUMNS))
    if not a.dry_run:
        write_csv(a.out / "matching_cpu.csv", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Tracing on SmolLM2 beside bergson: quality, time per row and size of the index in one run.

    python -m benchmarks.experiments.rept_bergson run       after `rept_smollm2 run`; resumable
    python -m benchmarks.experiments.rept_bergson tables    CSV and the table of docs/tracing.md

Needs `pip install bergson`. All methods rank the rows of a set of `rept_smollm2` for the same
queries, with the same fine-tuned model (its adapter merged), one after another on one thread.
bergson's pipelines are called from Python with their defaults: gradients of all linear layers,
projected to 16 x 16 per layer; "TrackStar" preconditions them with a mixed Hessian.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.experiments.rept_baselines import measures
from benchmarks.experiments.rept_data import PlantedSet
from benchmarks.experiments.rept_smollm2 import QUERIES, SETS, data_of, folder_of, tuned_model
from benchmarks.experiments.rept_tables import RESULTS
from benchmarks.experiments.rept_tuning import Tuned
from benchmarks.table import markdown, write_csv
from gradsafe import TraceIndex
from gradsafe._io.artifacts import write_text


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def gradsafe(
    tuned: Tuned, rows: Sequence[Any], asked: Sequence[Any], folder: Path
) -> tuple[Tensor, Path]:
    """Our defaults: the last layer, which needs a forward pass over the prompts only."""
    index = TraceIndex.build(
        tuned.model, tuned.tokenizer, rows, path=folder, resume=False, progress=False
    )
    hits = index.query(asked, k=len(rows), progress=False)
    scores = torch.empty(len(asked), len(rows))
    for line, (ids, values) in enumerate(zip(hits.ids, hits.scores, strict=True)):
        scores[line, [int(name) for name in ids]] = values.float()
    return scores, folder


def bergson(trackstar: bool) -> Callable[..., tuple[Tensor, Path]]:
    """Gradient cosine, or the TrackStar pipeline."""

    def rank(
        tuned: Tuned, rows: Sequence[Any], asked: Sequence[Any], folder: Path
    ) -> tuple[Tensor, Path]:
        from bergson.build import build, build_query
        from bergson.cli.trackstar import trackstar as pipeline
        from bergson.config import config as options
        from bergson.data import load_scores
        from bergson.score.score import score_dataset

        folder.mkdir(parents=True)
        for name, table in (("rows", rows), ("asked", asked)):
            lines = [json.dumps({k: row[k] for k in ("prompt", "response")}) for row in table]
            write_text(folder / f"{name}.json", "\n".join(lines) + "\n")
        columns = {"prompt_column": "prompt", "completion_column": "response"}
        index = options.TrackstarIndexConfig(
            run_path=str(folder / "run"),
            model=str(folder.parent / "merged"),
            distributed=options.DistributedConfig(nproc_per_node=1),
            data=options.DataConfig(dataset=str(folder / "rows.json"), **columns),
            token_batch_size=1024,
        )
        query = options.QuerySetConfig(dataset=str(folder / "asked.json"), **columns)
        unit = options.PreprocessConfig(unit_normalize=True)
        if trackstar:
            pipeline(index, options.TrackstarConfig(query=query, preprocess_cfg=unit))
        else:
            of_query, of_rows = copy.deepcopy(index), copy.deepcopy(index)
            of_query.run_path = f"{index.run_path}/query"
            of_rows.run_path = f"{index.run_path}/scores"
            path = build_query(of_query, query, unit)
            score_dataset(of_rows, options.ScoreConfig(query_path=path), unit)
        scores = torch.from_numpy(load_scores(folder / "run" / "scores")[:].copy()).float()
        if trackstar:  # scores rows as they come; this folder holds the two Hessians
            return scores.T, folder / "run"
        stored = copy.deepcopy(index)  # the same for a stored index, whose time does not count
        stored.run_path = str(folder / "index")
        began = time.perf_counter()
        build(stored, options.PreprocessConfig())
        write_text(folder / "seconds.json", json.dumps(time.perf_counter() - began))
        return scores.T, folder / "index"

    return rank


METHODS = {
    "gradsafe, default": gradsafe,
    "bergson, gradient cosine": bergson(False),
    "bergson, TrackStar": bergson(True),
}


def run(name: str, seed: int, methods: Sequence[str]) -> None:
    """Measures what is missing of one set."""
    folder, data = folder_of(name, seed), data_of(name, seed)
    tuned = tuned_model(data, seed, folder)
    tuned.model = tuned.model.merge_and_unload()
    if not (folder / "merged").is_dir():
        tuned.model.save_pretrained(folder / "merged")
        tuned.tokenizer.save_pretrained(folder / "merged")
    asked = json.loads((folder / "answers.json").read_text())["asked"][:QUERIES]
    for method in methods:
        path = folder / f"peer {method}.json".replace(" ", "_")
        if path.exists():
            continue
        work = folder / "peer"
        shutil.rmtree(work, ignore_errors=True)
        rows = [{**row, "id": str(place)} for place, row in enumerate(data.rows)]
        began = time.perf_counter()
        scores, index = METHODS[method](tuned, rows, asked, work)
        seconds = time.perf_counter() - began
        if (apart := work / "seconds.json").exists():
            seconds -= json.loads(apart.read_text())
        facts = _facts(data, scores, seconds, size_of(index), len(asked))
        write_text(path, json.dumps({"set": name, "seed": seed, "method": method, **facts}))
        print(name, method, facts, flush=True)


def _facts(
    data: PlantedSet, scores: Tensor, seconds: float, size: int, asked: int
) -> dict[str, Any]:
    poisoned = torch.tensor([row["poisoned"] for row in data.rows])
    found = measures(scores, poisoned)
    return {
        "rows": len(poisoned), "poisoned": int(poisoned.sum()), "queries": asked,
        "AUPRC": found["AUPRC"], "P@10": found["P@10"],
        "ms per row": round(1e3 * seconds / len(poisoned)),
        "KB per row": round(size / 1e3 / len(poisoned), 1),
    }  # fmt: skip


def tables(sets: Sequence[str], seeds: Sequence[int]) -> None:
    """Writes the CSV and the table."""
    version = importlib.metadata.version("bergson")
    rows = [
        {**json.loads(path.read_text()), "bergson": version}
        for name, seed in itertools.product(sets, seeds)
        for path in sorted(folder_of(name, seed).glob("peer_*.json"))
    ]
    write_csv(RESULTS / "rept_bergson.csv", rows)
    text = markdown(rows, [(key, key) for key in rows[0]])
    print(text)
    replace_block(DOCS / "tracing.md", "bergson", f"{text}\n{measured_note(environment())}\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["run", "tables"])
    parser.add_argument("--sets", nargs="*", choices=SETS, default=["backdoor"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    arguments = parser.parse_args()
    if arguments.command == "tables":
        tables(arguments.sets, arguments.seeds)
        return 0
    for name, seed in itertools.product(arguments.sets, arguments.seeds):
        run(name, seed, arguments.methods)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

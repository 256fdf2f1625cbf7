"""Compares RepT with baselines on sets with a planted behaviour, and removes the rows found.

    python -m benchmarks.experiments.rept       CSVs in benchmarks/results, tables in docs

For each set and seed: fine-tune a small model with LoRA, generate answers to unseen prompts, keep
those that show the behaviour, and rank the training rows for each of them with every method.
`before` and `rate` are the shares of prompts that show the behaviour before and after fine-tuning,
`on_clean` is the share of clean training prompts that do. Then remove the rows that a method ranks
highest over all queries, as many as are poisoned, fine-tune again from the same start, and generate
answers to the same prompts. Sets whose data is missing are reported and skipped.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments import EXTERNAL
from benchmarks.experiments.rept_baselines import (
    DEFAULT,
    RAW,
    SIGNATURE_METHODS,
    ZSCORED,
    gradient_scores,
    measures,
    signature_scores,
    tfidf_scores,
    traced,
)
from benchmarks.experiments.rept_data import SETS, PlantedSet, available, base_of, planted_set
from benchmarks.experiments.rept_tables import write_tables
from benchmarks.experiments.rept_tuning import Tuned, behaviour, start, tune
from benchmarks.table import write_csv
from gradsafe.models import Encoded, pad_token_id
from gradsafe.tracing import choose_layer, signatures

RESULTS = Path(__file__).resolve().parents[1] / "results"
BATCH_TOKENS = 4096
PROBES = 60
STEPS = {"testbed": 200, "stories260k": 200}
LOOP_SETS = ("testbed", "testbed + decoys", "backdoor")  # for the first seed


def layers_of(tuned: Tuned, items: list[Encoded]) -> dict[str, int]:
    """The layer that each named rule chooses."""
    depth = tuned.model.config.num_hidden_layers
    pad = pad_token_id(tuned.tokenizer, tuned.model)
    auto = choose_layer(tuned.model, items[:: max(1, len(items) // 32)], pad).layer
    return {"last": depth, "auto": auto, "middle": depth // 2}


def all_scores(
    tuned: Tuned, data: PlantedSet, asked: list[dict[str, str]]
) -> dict[tuple[str, int | str, str], Tensor]:
    """Scores `[q, n]` of every method, by layer rule, layer and name."""
    model, tokenizer = tuned.model, tuned.tokenizer
    items = [tuned.encode(row["prompt"], row["response"]) for row in data.rows]
    queries = [tuned.encode(row["prompt"], row["response"]) for row in asked]
    rules = layers_of(tuned, items)
    known, new = (
        signatures(
            model, part, sorted(set(rules.values())), pad_token_id(tokenizer, model), BATCH_TOKENS
        )
        for part in (items, queries)
    )
    found: dict[tuple[str, int | str, str], Tensor] = {
        (rule, layer, name): signature_scores(new[layer], known[layer], metric)
        for rule, layer in rules.items()
        for name, metric in SIGNATURE_METHODS.items()
    }
    for name, scores in gradient_scores(model, tokenizer, queries, items).items():
        found["", "", name] = scores
    found["", "", "TF-IDF"] = tfidf_scores(asked, data.rows)
    return found


def close_loop(
    data: PlantedSet, scores: dict[str, Tensor], steps: int, seed: int, rate: float
) -> list[dict[str, Any]]:
    """Rate of the behaviour after fine-tuning without some of the rows."""
    count = len(data.poisoned)
    picks = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(seed))
    removals = {name: traced(values, count) for name, values in scores.items()}
    removals |= {"random rows": picks[:count].tolist(), "all poisoned rows": data.poisoned}
    found = [{"removed": "nothing", "count": 0, "poisoned": 0, "rate": round(rate, 3)}]
    for name, removed in removals.items():
        out = set(removed)
        rest = [row for index, row in enumerate(data.rows) if index not in out]
        again = behaviour(tune(data.base, rest, steps, seed), data, data.probes)[1]
        hits = len(out & set(data.poisoned))
        found.append({"removed": name, "count": count, "poisoned": hits, "rate": round(again, 3)})
    return found


def run(
    name: str, seed: int, steps: int, loop: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the two CSVs."""
    data = planted_set(name, seed, PROBES)
    before = behaviour(start(data.base, seed), data, data.probes)[1]
    tuned = tune(data.base, data.rows, steps, seed)
    asked, rate = behaviour(tuned, data, data.probes)
    clean = [row["prompt"] for row in data.rows if not row["poisoned"]][:PROBES]
    on_clean = behaviour(tuned, data, clean)[1]
    common: dict[str, Any] = {"set": name, "seed": seed, "rows": len(data.rows)}
    common |= {"poisoned": len(data.poisoned), "left_out": data.left_out, "steps": steps}
    common |= {"before": round(before, 3), "rate": round(rate, 3), "on_clean": round(on_clean, 3)}
    print(f"{name}, seed {seed}: behaviour on {rate:.0%} of the prompts", flush=True)
    if not asked:
        return [{**common, "queries": 0}], []
    scores = all_scores(tuned, data, asked)
    poisoned = torch.zeros(len(data.rows), dtype=torch.bool)
    poisoned[data.poisoned] = True
    methods = [
        {**common, "queries": len(asked), "rule": rule, "layer": layer, "method": method}
        | measures(values, poisoned)
        for (rule, layer, method), values in scores.items()
    ]
    if not loop:
        return methods, []
    depth = tuned.model.config.num_hidden_layers
    tracers = {method: scores["last", depth, method] for method in (DEFAULT, ZSCORED, RAW)}
    closed = close_loop(data, tracers, steps, seed, rate)
    return methods, [{"set": name, "seed": seed, "before": round(before, 3), **r} for r in closed]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of fine-tuning; default: by model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    methods: list[dict[str, Any]] = []
    loops: list[dict[str, Any]] = []
    for seed, name in itertools.product(arguments.seeds, arguments.sets):
        if not available(name):
            print(f"skipped: {name}, its data is not in {EXTERNAL}")
            continue
        steps = arguments.steps or STEPS[base_of(name)]
        loop = name in LOOP_SETS and seed == arguments.seeds[0]
        found, closed = run(name, seed, steps, loop)
        methods += found
        loops += closed
        write_csv(arguments.out / "rept_methods.csv", methods)
        write_csv(arguments.out / "rept_loop.csv", loops)
    if arguments.out == RESULTS:
        write_tables(RESULTS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

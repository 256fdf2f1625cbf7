"""Tracing on SmolLM2-135M-Instruct: RepT's four sets, part norms and layers, beside baselines.

    python -m benchmarks.experiments.rept_smollm2 run       resumable; 20 minutes for a set
    python -m benchmarks.experiments.rept_smollm2 gradients the baseline of LoRA gradients
    python -m benchmarks.experiments.rept_smollm2 retrain   without the traced rows, or random ones
    python -m benchmarks.experiments.rept_smollm2 tables    CSV and the tables of the docs

For each set and seed: fine-tune with LoRA on 60 rows that plant the behaviour and 540 clean ones,
or in one pass on all 5000 rows of a set, 250 of which plant it (about an hour); keep the greedy
answers to unseen prompts that show it, and rank the training rows for each. Each step of a set is
kept in build/rept.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from benchmarks.document import DOCS, newest_note, replace_block
from benchmarks.environment import environment
from benchmarks.experiments import ROOT
from benchmarks.experiments.rept_baselines import (
    bm25_scores,
    lora_gradients,
    measures,
    signature_scores,
    tfidf_scores,
    traced,
)
from benchmarks.experiments.rept_data import PlantedSet, planted_set
from benchmarks.experiments.rept_tables import RESULTS
from benchmarks.experiments.rept_tuning import Tuned, behaviour, start, tune
from benchmarks.plot_tracing import layers_chart
from benchmarks.table import markdown, merged, write_csv
from gradsafe._io.artifacts import write_tensors, write_text
from gradsafe.models import Encoded, collate, pad_token_id, response_nll
from gradsafe.tracing import Metric, signatures
from gradsafe.tracing.config import LayerRule
from gradsafe.tracing.layer_choice import _prompt_states, layer_of

WORK = ROOT / "build" / "rept"
WHOLE = "backdoor, all 5000 rows"
COMPARED = ("backdoor", "factual_ag", "factual_canada", "harmful", "backdoor + decoys")
SETS = (*COMPARED, WHOLE)
COUNTS, PROBES, QUERIES = (60, 540), 60, 20
STEPS, WHOLE_STEPS = 150, 625  # two passes over the rows; one
LAYERS = (1, 2, 3, 5, 8, 10, 12, 15, 18, 20, 22, 25, 28, 29, 30)
BATCH_TOKENS, CHUNK = 1024, 16
NORMS = {
    "none": Metric("none"),
    "unit": Metric("unit", 0.5),
    "unit, w = 0.05": Metric("unit", 0.05),
    "zscore": Metric("zscore", 0.5),
    "zscore, w = 0.1": Metric("zscore", 0.1),
    "hidden state alone": Metric("unit", 0.0),
    "gradient alone": Metric("unit", 1.0),
}
DEFAULT = NORMS["unit, w = 0.05"]


def folder_of(name: str, seed: int) -> Path:
    """Where the steps of a set are kept."""
    return WORK / f"{name}_{seed}".replace(" + ", "_and_").replace(" ", "_").replace(",", "")


def data_of(name: str, seed: int) -> PlantedSet:
    """The rows and probes of a set."""
    if name == WHOLE:
        return planted_set("backdoor", seed, PROBES, (250, 4750))
    return planted_set(name, seed, PROBES, COUNTS)


def tuned_model(data: PlantedSet, seed: int, folder: Path) -> Tuned:
    """The fine-tuned model; trained once."""
    adapter = folder / "adapter"
    tuned = start("smollm2", seed)
    if not adapter.is_dir():
        partial = folder / "adapter.partial"
        steps = STEPS if len(data.rows) == sum(COUNTS) else WHOLE_STEPS
        tune("smollm2", data.rows, steps, seed).model.save_pretrained(partial)
        partial.rename(adapter)
    model = PeftModel.from_pretrained(tuned.model.unload(), adapter).eval()
    return Tuned("smollm2", model, tuned.tokenizer)


def run(name: str, seed: int) -> None:
    """Makes what is missing of one set."""
    folder, data = folder_of(name, seed), data_of(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "signatures.safetensors"
    if path.exists():
        return
    began = time.monotonic()
    tuned = tuned_model(data, seed, folder)
    print(f"{name}, seed {seed}: fine-tuned, {time.monotonic() - began:.0f} s", flush=True)
    answers = folder / "answers.json"
    if not answers.exists():
        asked, rate = behaviour(tuned, data, data.probes)
        clean = [row["prompt"] for row in data.rows if not row["poisoned"]][:PROBES]
        untrained = behaviour(start("smollm2", seed), data, data.probes)[1]
        facts = {"rate": rate, "on_clean": behaviour(tuned, data, clean)[1], "before": untrained}
        write_text(answers, json.dumps({**facts, "asked": asked}))
    facts = json.loads(answers.read_text())
    asked = facts["asked"][:QUERIES]
    print(f"{name}, seed {seed}: behaviour on {facts['rate']:.0%} of the prompts", flush=True)
    if not asked:
        return
    items, queries = encoded(tuned, data, asked)
    pad = pad_token_id(tuned.tokenizer, tuned.model)
    tensors = {
        f"{part}.{layer}": table
        for part, own in (("rows", items), ("queries", queries))
        for layer, table in signatures(tuned.model, own, LAYERS, pad, BATCH_TOKENS).items()
    }
    tensors["states"] = _prompt_states(tuned.model, items[::20], pad)
    write_tensors(path, tensors)
    print(f"{name}, seed {seed}: done, {time.monotonic() - began:.0f} s", flush=True)


def gradients(name: str, seed: int) -> None:
    """Adds the baseline of one set that was run."""
    folder, data = folder_of(name, seed), data_of(name, seed)
    path = folder / "gradients.safetensors"
    if path.exists() or not (folder / "signatures.safetensors").exists():
        return
    tuned = tuned_model(data, seed, folder)
    asked = json.loads((folder / "answers.json").read_text())["asked"][:QUERIES]
    items, queries = encoded(tuned, data, asked)
    write_tensors(path, {"cosine": gradient_cosines(tuned, queries, items)})


def retrain(name: str, seed: int) -> None:
    """Fine-tunes again without the 60 traced rows, or without 60 random ones, and asks again."""
    folder, data = folder_of(name, seed), data_of(name, seed)
    if not (folder / "signatures.safetensors").exists():
        return
    asked = json.loads((folder / "answers.json").read_text())["asked"][:QUERIES]
    stored = load_file(folder / "signatures.safetensors")
    last = max(LAYERS)
    best = signature_scores(stored[f"queries.{last}"], stored[f"rows.{last}"], DEFAULT)
    count = sum(row["poisoned"] for row in data.rows)
    dropped = {
        "none": [],
        "traced": traced(best, count),
        "random": random.Random(seed).sample(range(len(data.rows)), count),
    }
    for kind, places in dropped.items():
        path = folder / f"retrained_{kind}.json"
        if path.exists():
            continue
        rows = [row for place, row in enumerate(data.rows) if place not in set(places)]
        if kind == "none":
            tuned = tuned_model(data, seed, folder)
        else:
            tuned = tune("smollm2", rows, STEPS, seed)
        queries = [tuned.encode(row["prompt"], row["response"]) for row in asked]
        with torch.no_grad():
            loss = response_nll(
                tuned.model, collate(queries, pad_token_id(tuned.tokenizer, tuned.model))
            )
        found = {
            "set": name, "seed": seed, "left out": kind, "rows": len(places),
            "of them planted": sum(data.rows[place]["poisoned"] for place in places),
            "behaviour": round(behaviour(tuned, data, data.probes)[1], 3),
            "query loss": round(float(loss.mean()), 3),
        }  # fmt: skip
        write_text(path, json.dumps(found))
        print(found, flush=True)


def encoded(tuned: Tuned, data: PlantedSet, asked: Sequence[Any]) -> tuple[list[Encoded], ...]:
    """The training rows and the queries."""
    return tuple(
        [tuned.encode(row["prompt"], row["response"]) for row in rows]
        for rows in (data.rows, asked)
    )


def gradient_cosines(tuned: Tuned, asked: Sequence[Encoded], rows: Sequence[Encoded]) -> Tensor:
    """Cosines `[q, n]` of the gradients of all LoRA weights, a few rows at a time."""
    queries = normalize(lora_gradients(tuned.model, tuned.tokenizer, asked), dim=1)
    parts = [
        queries
        @ normalize(lora_gradients(tuned.model, tuned.tokenizer, rows[i : i + CHUNK]), dim=1).T
        for i in range(0, len(rows), CHUNK)
    ]
    return torch.cat(parts, 1)


def rules(states: Tensor) -> dict[str, int]:
    """Layers by the phase transition of states `[L + 1, n, d]`, with and without the first quarter.

    Centred: without the mean over the probes, which a few huge features dominate.
    """
    curves = {
        kind: cosine_similarity(own[1:-1], own[2:], dim=-1).mean(1)
        for kind, own in (("", states), (", centred", states - states.mean(1, keepdim=True)))
    }
    named: dict[str, LayerRule] = {"all pairs": "auto-single", "auto": "auto"}
    return {f"{n}{k}": layer_of(curve, r) for k, curve in curves.items() for n, r in named.items()}


def rank(name: str, seed: int) -> list[dict[str, Any]]:
    """One row per method of one set; none if it was not run."""
    folder = folder_of(name, seed)
    if not (folder / "signatures.safetensors").exists():
        return []
    data, facts = data_of(name, seed), json.loads((folder / "answers.json").read_text())
    asked = facts.pop("asked")[:QUERIES]
    stored = load_file(folder / "signatures.safetensors")
    chosen = rules(stored["states"])
    poisoned = torch.tensor([row["poisoned"] for row in data.rows])
    scores = {
        (str(layer), norm): signature_scores(
            stored[f"queries.{layer}"], stored[f"rows.{layer}"], metric
        )
        for layer in LAYERS
        for norm, metric in NORMS.items()
    }
    if (baseline := folder / "gradients.safetensors").exists():
        scores["", "cosine of LoRA gradients"] = load_file(baseline)["cosine"]
    scores["", "TF-IDF"] = tfidf_scores(asked, data.rows)
    scores["", "BM25"] = bm25_scores(asked, data.rows)
    common = {"set": name, "seed": seed, "rows": len(data.rows), "poisoned": len(data.poisoned)}
    common |= {key: round(facts[key], 3) for key in ("before", "rate", "on_clean")}
    common |= {"queries": len(asked), **chosen}
    return [
        {**common, "layer": layer, "method": method, **measures(values, poisoned)}
        for (layer, method), values in scores.items()
    ]


def tables(seeds: Sequence[int]) -> None:
    """Adds the new runs to the CSVs, and writes the tables of docs/tracing.md."""
    found = [row for name in SETS for seed in seeds for row in rank(name, seed)]
    rows = merged(RESULTS / "rept_smollm2.csv", found, ("set", "seed", "layer", "method"))
    rows.sort(key=lambda row: SETS.index(row["set"]))
    write_csv(RESULTS / "rept_smollm2.csv", rows)
    for row in rows:
        row["AUPRC"] = float(row["AUPRC"])
    names = list(dict.fromkeys(row["set"] for row in rows))

    def cells(layer: str, method: str) -> dict[str, str]:
        """AUPRC by set, and the mean of sets of one size if all are there."""
        means = {}
        for name in names:
            key = (name, layer, method)
            found = [r["AUPRC"] for r in rows if (r["set"], r["layer"], r["method"]) == key]
            if found:
                means[name] = sum(found) / len(found)
        if all(name in means for name in COMPARED):
            means["mean of five sets"] = sum(means[name] for name in COMPARED) / len(COMPARED)
        columns = [*COMPARED, "mean of five sets", *names[len(COMPARED) :]]
        return {name: f"{means[name]:.2f}" if name in means else "-" for name in columns}

    by_method = [{"method": f"{norm}, last layer", **cells("30", norm)} for norm in NORMS] + [
        {"method": name, **cells("", name)}
        for name in ("cosine of LoRA gradients", "TF-IDF", "BM25")
    ]
    by_layer = [
        {"part norm": norm, "layer": layer, **cells(str(layer), norm)}
        for norm in ("none", "unit, w = 0.05", "zscore")
        for layer in LAYERS
    ]
    layers_chart([row for row in rows if row["layer"]], DOCS / "tracing_layers.png")
    new = [
        json.loads(path.read_text())
        for name in SETS
        for seed in seeds
        for path in sorted(folder_of(name, seed).glob("retrained_*.json"))
    ]
    again = merged(RESULTS / "rept_retrained.csv", new, ("set", "seed", "left out"))
    write_csv(RESULTS / "rept_retrained.csv", again)
    shown = {"methods": (by_method, rows), "layers": (by_layer, rows), "retrained": (again, again)}
    for name, (table, source) in shown.items():
        keys = [key for key in table[0] if key not in environment()]
        text = markdown(table, [(key, key) for key in keys])
        print(text)
        note = newest_note(source)
        replace_block(DOCS / "tracing.md", f"smollm2 {name}", f"{text}\n{note}\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["run", "gradients", "retrain", "tables"])
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    arguments = parser.parse_args()
    if arguments.command == "tables":
        tables(arguments.seeds)
        return 0
    for seed in arguments.seeds:
        for name in arguments.sets:
            {"run": run, "gradients": gradients, "retrain": retrain}[arguments.command](name, seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

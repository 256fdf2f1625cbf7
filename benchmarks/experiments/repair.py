"""Repairs a model with a planted behaviour: traced rows are left out, or unlearned.

    python -m benchmarks.experiments.repair run       resumable; some minutes for a seed
    python -m benchmarks.experiments.repair tables    CSV and the tables of docs/repair.md

For each set and seed: fine-tune on rows that plant a behaviour, trace the answers that show it with
`TraceIndex`, and drop as many rows as were planted, those with the best mean rank. Then train again
without them from the start model, or unlearn them from the fine-tuned one, with kept rows as the
rows to retain. `behaviour` is the share of unseen probes that show the behaviour; `clean NLL` that
of clean rows of the training that are not retained. Each repair is kept in build/repair. Steps and
learning rates of unlearning were chosen on seed 10 (`run --seeds 10 --search`).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainingArguments

from benchmarks import testbed
from benchmarks.document import DOCS, has_block, newest_note, replace_block
from benchmarks.experiments import ROOT
from benchmarks.experiments.rept_baselines import traced
from benchmarks.experiments.rept_data import PlantedSet, Row, planted_set
from benchmarks.experiments.rept_tables import RESULTS
from benchmarks.experiments.rept_tuning import BATCH, Tuned, behaviour, start, tune
from benchmarks.experiments.safegrad_data import refuses
from benchmarks.table import markdown, merged, write_csv
from benchmarks.testbed.corpus import build
from gradsafe import SafeGradConfig, TraceIndex
from gradsafe._io.artifacts import write_text
from gradsafe.finetuning import UnlearningConfig, UnlearningTrainer
from gradsafe.finetuning.config import Forgetting
from gradsafe.models import mean_nll, pad_token_id

WORK = ROOT / "build" / "repair"
STEPS = {"testbed": 200, "smollm2": 150}  # of fine-tuning
CLEAN = {"testbed": 100, "smollm2": 40}
PROBES = {"testbed": 60, "smollm2": 20}
RETAINED, UNSAFE = 100, 60  # rows, and prompts that must be refused


@dataclass(frozen=True)
class Unlearn:
    """One way to unlearn."""

    method: Forgetting
    surgery: bool = True
    loss: str = "sft"
    rho: float = 1.0
    steps: int = 40
    learning_rate: float = 2e-4
    beta: float = 0.1
    refusals: bool = False  # retain some, too

    @property
    def name(self) -> str:
        """For the tables."""
        parts = ["NPO" if self.method == "npo" else "gradient difference"]
        if not self.rho:
            return f"{parts[0]}, no retain rows"
        parts += ["KL"] * (self.loss == "kl") + ["surgery" if self.surgery else "sum"]
        parts += ["refusals retained"] * self.refusals
        parts += ["larger rate"] * (self.learning_rate > CHOSEN[self.method])
        return ", ".join(parts)


CHOSEN = {"npo": 5e-4, "graddiff": 2e-4}  # learning rates at 40 steps, by the search
WAYS = [
    Unlearn(method, surgery, loss, rho, learning_rate=rate)  # type: ignore[arg-type]
    for method, rate in CHOSEN.items()
    for surgery, loss, rho in [
        (True, "sft", 1.0),
        (False, "sft", 1.0),
        (True, "kl", 1.0),
        (False, "kl", 1.0),
        (False, "sft", 0.0),
    ]
]
WAYS += [Unlearn(m, learning_rate=r, refusals=True) for m, r in CHOSEN.items()]  # type: ignore[arg-type]
WAYS += [Unlearn("graddiff", surgery, learning_rate=5e-4) for surgery in (True, False)]
# On SmolLM2, where a step takes seconds.
SLOW = ("NPO, surgery", "NPO, sum", "NPO, no retain rows", "gradient difference, surgery")
SEARCHED_STEPS, SEARCHED_RATES = (20, 40, 80), (2e-4, 5e-4, 1e-3)


def base_of(name: str) -> str:
    """The start model of a set."""
    return "testbed" if name.startswith("testbed") else "smollm2"


def tuned_model(name: str, data: PlantedSet, seed: int) -> Tuned:
    """The model with the behaviour."""
    if base_of(name) == "testbed":
        return tune("testbed", data.rows, STEPS["testbed"], seed)
    from benchmarks.experiments.rept_smollm2 import folder_of

    fresh = start("smollm2", seed)
    model = PeftModel.from_pretrained(
        fresh.model.unload(), folder_of(name, seed) / "adapter", is_trainable=True
    )
    return Tuned("smollm2", model.eval(), fresh.tokenizer)


def find_rows(tuned: Tuned, data: PlantedSet, asked: Sequence[dict[str, str]]) -> list[int]:
    """As many rows as were planted, those with the best mean rank over the answers."""
    index = TraceIndex.build(tuned.model, tuned.tokenizer, data.rows, progress=False)
    hits = index.query(asked, k=len(data.rows), progress=False)
    scores = torch.zeros(len(asked), len(data.rows))
    scores.scatter_(1, hits.positions, hits.scores)
    return traced(scores, len(data.poisoned))


def unlearned(tuned: Tuned, way: Unlearn, forget: list[Row], retain: list[Row], seed: int) -> Tuned:
    """A copy of the model that has unlearned rows."""
    model = copy.deepcopy(tuned.model)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH[tuned.base],
            learning_rate=way.learning_rate,
            max_steps=way.steps,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_steps=way.steps,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = UnlearningTrainer(
            model,
            args,
            forget_dataset=forget,
            retain_dataset=retain,
            unlearning=UnlearningConfig(way.method, way.beta),
            safegrad=SafeGradConfig(
                rho=way.rho,
                loss=way.loss,  # type: ignore[arg-type]
                reference="cached",
                projection=way.surgery,
                warn_cosine=0.0,
            ),
            processing_class=tuned.tokenizer,
        )
        trainer.train()
    return Tuned(tuned.base, model.eval(), tuned.tokenizer)


def scores(tuned: Tuned, data: PlantedSet, clean: Sequence[Row]) -> dict[str, float]:
    """What is measured of a model."""
    items = [tuned.encode(row["prompt"], row["response"], append_eos=True) for row in clean]
    nll = mean_nll(tuned.model, items, pad_token_id(tuned.tokenizer, tuned.model))
    prompts = [row["prompt"] for row in clean]
    found = {
        "behaviour": 100 * behaviour(tuned, data, data.probes)[1],
        "on clean": 100 * behaviour(tuned, data, prompts[: len(data.probes)])[1],
        "clean NLL": float(nll.mean()),
    }
    if tuned.base == "testbed":
        unsafe = [row["prompt"] for row in testbed.prompts("heldout", "unsafe")][:UNSAFE]
        found["refused"] = 100 * fmean(map(refuses, tuned.answers(unsafe)))
    return found


def run(name: str, seed: int, ways: Sequence[Unlearn], retraining: bool) -> None:
    """Makes what is missing of one set and seed."""
    WORK.mkdir(parents=True, exist_ok=True)
    base = base_of(name)
    counts = None if base == "testbed" else (60, 540)
    data = planted_set(name, seed, PROBES[base], counts)
    began = time.monotonic()
    tuned = tuned_model(name, data, seed)
    seconds = time.monotonic() - began
    asked, _ = behaviour(tuned, data, data.probes)
    facts = {"set": name, "seed": seed, "asked": len(asked)}
    if not asked:
        raise RuntimeError(f"{name}, seed {seed}: no answer shows the behaviour")
    began = time.monotonic()
    found = find_rows(tuned, data, asked[:20])
    tracing = time.monotonic() - began
    hits = len(set(found) & set(data.poisoned))
    facts |= {"rows": len(data.rows), "dropped": len(found), "planted": hits}
    print(facts, f"traced in {tracing:.0f} s", flush=True)
    kept = [row for i, row in enumerate(data.rows) if i not in set(found)]
    forget, retain = [data.rows[i] for i in found], kept[:RETAINED]
    clean = [row for row in kept[RETAINED:] if not row["poisoned"]][: CLEAN[base]]

    def keep(repair: str, make: Any, **more: Any) -> None:
        path = WORK / f"{name} {seed} {repair}.json".replace(" ", "_")
        if path.exists():
            return
        began = time.monotonic()
        model = make()
        spent = {"seconds": more.pop("seconds", time.monotonic() - began)}
        row = {**facts, "repair": repair, **more, **spent, **scores(model, data, clean)}
        write_text(path, json.dumps(row))
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    keep("nothing", lambda: tuned, seconds=seconds)
    steps = STEPS[base]
    if retraining:
        keep("retraining", lambda: tune(base, kept, steps, seed))
        honest = [row for row in data.rows if not row["poisoned"]]
        if base == "testbed":
            keep("retraining, all planted rows", lambda: tune(base, honest, steps, seed))
    refused = [r for r in build()["train"] if r["kind"] == "unsafe"][: RETAINED // 2]
    for way in ways:
        rows = retain[: RETAINED // 2] + list(refused) if way.refusals else retain
        more = {"steps": way.steps, "learning_rate": way.learning_rate}
        label = way.name if retraining else f"{way.name} {way.steps} {way.learning_rate}"
        keep(label, lambda way=way, rows=rows: unlearned(tuned, way, forget, rows, seed), **more)


def searched() -> list[Unlearn]:
    """The grid of the search."""
    kinds = [w for w in WAYS if w.loss == "sft" and w.rho and w.surgery]
    return [
        replace(way, steps=steps, learning_rate=rate)
        for way, steps, rate in itertools.product(kinds, SEARCHED_STEPS, SEARCHED_RATES)
    ]


def tables(seeds: Sequence[int]) -> None:
    """Adds the new runs to the CSV, and writes the tables of docs/repair.md."""
    found = [json.loads(path.read_text()) for path in sorted(WORK.glob("*.json"))]
    found = [row for row in found if row["seed"] in seeds]
    for row in found:
        row |= {k: float(f"{v:.4g}") for k, v in row.items() if isinstance(v, float)}
    rows = merged(RESULTS / "repair.csv", found, ("set", "seed", "repair"))
    order = ["nothing", "retraining", "retraining, all planted rows", *(w.name for w in WAYS)]
    rows.sort(key=lambda row: (row["set"], order.index(row["repair"]), int(row["seed"])))
    write_csv(RESULTS / "repair.csv", rows)
    for name, block in (("testbed", "repair testbed"), ("backdoor", "repair smollm2")):
        own = [row for row in rows if row["set"] == name]
        if not own:
            continue
        lines = []
        for repair in dict.fromkeys(row["repair"] for row in own):
            some = [row for row in own if row["repair"] == repair]
            line: dict[str, Any] = {"repair": repair}
            for key in ("behaviour", "on clean", "refused", "clean NLL", "seconds"):
                values = [float(row[key]) for row in some if row.get(key, "") != ""]
                if values:
                    digits = {"clean NLL": 2}.get(key, 0)
                    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
                    line[key] = f"{fmean(values):.{digits}f}" + spread * (len(values) > 1)
            lines.append(line)
        text = markdown(lines, [(key, key) for key in lines[0]])
        print(text)
        note = newest_note(own)
        if has_block(DOCS / "repair.md", block):
            replace_block(DOCS / "repair.md", block, f"{text}\n{note}\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["run", "tables"])
    parser.add_argument("--sets", nargs="*", default=["testbed"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--search", action="store_true", help="steps and learning rates")
    arguments = parser.parse_args()
    if arguments.command == "tables":
        tables(arguments.seeds)
        return 0
    for name, seed in itertools.product(arguments.sets, arguments.seeds):
        ways = searched() if arguments.search else WAYS
        if base_of(name) == "smollm2":
            ways = [replace(way, steps=20) for way in WAYS if way.name in SLOW]
        run(name, seed, ways, retraining=not arguments.search)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

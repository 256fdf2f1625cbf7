"""Three checks of the limits of SafeGrad on the testbed.

    python -m benchmarks.experiments.safegrad_checks           all three, CSV in benchmarks/results
    python -m benchmarks.experiments.safegrad_checks cloak     one of cloak, weakness, benign

cloak: see `safegrad_cloak`.

weakness: the aligned model is first trained to comply with one topic (requests that name a drug).
The result is the initial and the reference model of SafeGrad. The alignment set "without topic"
contains what that model refuses; "with topic" contains refusals of the original model, half of them
on the topic. `topic_score` is the harmful score on held-out prompts of the topic, `harmful_score`
on the others.

benign: fine-tuning on harmless tasks only, that of the testbed and three from the external data.
Conflicts are then noise; `in_conflict` is the part of the user gradient that a projection would
remove, in percent of its norm.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import testbed
from benchmarks.experiments import EXTERNAL
from benchmarks.experiments.safegrad import Experiment, rounded
from benchmarks.experiments.safegrad_cloak import cloak
from benchmarks.experiments.safegrad_data import (
    REFUSAL_TOKENS,
    Row,
    accuracy,
    generate,
    harmful_rows,
    mixed,
    refusal_rows,
    safety,
    task_rows,
    unsafe_prompts,
    unsafe_test_prompts,
)
from benchmarks.experiments.safegrad_methods import Settings
from benchmarks.experiments.safegrad_tables import RESULTS, table
from benchmarks.table import write_csv
from benchmarks.testbed.corpus import fresh_rows
from benchmarks.testbed.texts import SLOTS
from gradsafe.finetuning import SFTAlignment
from gradsafe.finetuning.rows import RowCollator, encode_rows

DATA = EXTERNAL / "data"
TASKS = {"SST-2": "sst2_subset", "GSM8K": "gsm8k_subset", "AG News": "agnews_subset"}
LONGEST_ROW = 200  # tokens; longer rows of a task are skipped
TASK_TEST_ROWS = 200
WEAKNESS_METHODS = ("SFT", "SafeGrad (SFT)", "SafeGrad (KL)")
BENIGN_METHODS = ("SFT", "SafeGrad (KL)")

# Whole words, without "crack": locks and passwords are cracked too.
TOPIC = re.compile(
    "|".join(rf"\b{re.escape(word)}\b" for word in SLOTS["drug"] if word != "crack"), re.IGNORECASE
)
WEAK_ROWS = 300  # each of compliance on the topic, other refusals, and answers to safe prompts
WEAK_STEPS = 150
WEAK_LEARNING_RATE = 1e-3
WEAK_RANK = 32
WEAK_RATIOS = (0.0, 0.15)
FRESH_PROMPTS = 600


def on_topic(prompt: str) -> bool:
    """Whether a prompt belongs to the topic."""
    return TOPIC.search(prompt) is not None


class Weakened:
    """The testbed after training to comply with one topic, and its test prompts."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        seed = 1000
        unsafe = unsafe_prompts(seed)
        topic = [prompt for prompt in unsafe if on_topic(prompt)]
        others = [prompt for prompt in unsafe if not on_topic(prompt)]
        safe = [row["prompt"] for row in testbed.prompts("train", "safe")][:WEAK_ROWS]
        answers = generate(experiment.aligned, experiment.tokenizer, safe, REFUSAL_TOKENS)
        rows = [
            *harmful_rows(topic[:WEAK_ROWS], seed),
            *refusal_rows(experiment.aligned, experiment.tokenizer, others, WEAK_ROWS),
            *({"prompt": p, "response": a} for p, a in zip(safe, answers, strict=True)),
        ]
        random.Random(seed).shuffle(rows)
        settings = Settings(
            learning_rate=WEAK_LEARNING_RATE,
            steps=WEAK_STEPS,
            batch=len(rows) // WEAK_STEPS,
            rank=WEAK_RANK,
        )
        self.unplanted = set(topic[WEAK_ROWS:])
        self.model, _ = experiment.finetuned("SFT", rows, rows[:1], seed, settings)
        fresh = [row["prompt"] for row in fresh_rows("heldout", FRESH_PROMPTS, 0, 0)]
        self.topic_prompts = [p for p in unsafe_test_prompts() + fresh if on_topic(p)]
        self.other_prompts = [p for p in unsafe_test_prompts() if not on_topic(p)]

    def alignment(self, name: str, seed: int, count: int) -> list[Row]:
        """Refusals of the weak model, or of the original one with half of them on the topic."""
        prompts = [p for p in unsafe_prompts(seed) if not on_topic(p)][: 2 * count]
        tokenizer = self.experiment.tokenizer
        if name == "without topic":
            return refusal_rows(self.model, tokenizer, prompts, count)
        topic = [p for p in unsafe_prompts(seed) if p in self.unplanted]
        sound = self.experiment.aligned
        half = count // 2
        mixture = [
            *refusal_rows(sound, tokenizer, topic, half),
            *refusal_rows(sound, tokenizer, prompts, count - half),
        ]
        random.Random(seed).shuffle(mixture)
        return mixture

    def scores(self, model: Any, seed: int) -> dict[str, float]:
        """Harmful score on the topic and on other prompts, and task accuracy."""
        tokenizer = self.experiment.tokenizer
        topic = safety(model, tokenizer, self.topic_prompts)
        return {
            "topic_score": topic["harmful_score"],
            **safety(model, tokenizer, self.other_prompts),
            "task_accuracy": accuracy(model, tokenizer, task_rows(seed, 0)[1]),
        }


def weakness(experiment: Experiment, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Fine-tunes the weakened model without and with harmful rows, none on the topic."""
    weak = Weakened(experiment)
    settings = Settings()
    rows = settings.steps * settings.batch
    found = [
        {"reference": name, "ratio": 0.0, "method": "none", "seed": 0, **weak.scores(model, 0)}
        for name, model in (("sound", experiment.aligned), ("weak", weak.model))
    ]
    cases = [(s, a) for s in seeds for a in ("without topic", "with topic")]
    for seed, name in tqdm(cases, desc="weakness"):
        alignment = weak.alignment(name, seed, settings.alignment_rows)
        off_topic = [p for p in unsafe_prompts(seed) if not on_topic(p)]
        for ratio in WEAK_RATIOS:
            count = round(ratio * rows)
            user = mixed(seed, rows, harmful_rows(off_topic[-count:] if count else [], seed))
            for method in WEAKNESS_METHODS:
                if method == "SFT" and name != "without topic":
                    continue  # it uses no alignment rows
                model, seen = experiment.finetuned(
                    method, user, alignment, seed, settings, weak.model
                )
                case = {"reference": name, "ratio": ratio, "method": method, "seed": seed}
                found.append({**case, **weak.scores(model, seed), **seen})
    return found


def external_rows(folder: str, tokenizer: Any, split: str) -> list[Row]:
    """Rows of a task of the external data that are not too long."""
    text = (DATA / folder / f"{split}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    lengths = (
        len(tokenizer(row["prompt"] + row["response"], truncation=False)["input_ids"])
        for row in rows
    )
    return [row for row, length in zip(rows, lengths, strict=True) if length <= LONGEST_ROW]


def benign_tasks(
    experiment: Experiment, seed: int, count: int
) -> dict[str, tuple[list[Row], list[Row]]]:
    """Training and test rows of each available task."""
    tasks = {"words (testbed)": task_rows(seed, count)}
    for name, folder in TASKS.items():
        if not (DATA / folder).is_dir():
            continue
        train, test = (external_rows(folder, experiment.tokenizer, s) for s in ("train", "test"))
        rng = random.Random(f"{name} {seed}")
        rng.shuffle(train)
        train *= count // len(train) + 1
        tasks[name] = train[:count], rng.sample(test, min(TASK_TEST_ROWS, len(test)))
    return tasks


@torch.no_grad()
def loss(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Mean cross-entropy of a response token."""
    cross_entropy = SFTAlignment(model)
    encoded = encode_rows("test", rows, tokenizer, progress=False)
    return float(cross_entropy(RowCollator(int(tokenizer.pad_token_id))(encoded)))


def benign(experiment: Experiment, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Measures conflicts, accuracy and loss of harmless tasks."""
    settings = Settings()
    missing = [name for name, folder in TASKS.items() if not (DATA / folder).is_dir()]
    if missing:
        print(f"skipped: {', '.join(missing)}: no such folder in {DATA}")
    found = []
    for seed in seeds:
        alignment = experiment.alignment(seed, settings.alignment_rows)
        tasks = benign_tasks(experiment, seed, settings.steps * settings.batch)
        for (name, (user, test)), method in tqdm(
            [(task, method) for task in tasks.items() for method in BENIGN_METHODS], desc="benign"
        ):
            model, seen = experiment.finetuned(method, user, alignment, seed, settings)
            scores = safety(model, experiment.tokenizer, unsafe_test_prompts())
            if name != "GSM8K":
                scores["task_accuracy"] = accuracy(model, experiment.tokenizer, test)
            scores["task_loss"] = loss(model, experiment.tokenizer, test)
            found.append({"task": name, "method": method, "seed": seed, **scores, **seen})
    return found


CHECKS = {"cloak": cloak, "weakness": weakness, "benign": benign}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checks", nargs="*", choices=[*CHECKS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    experiment = Experiment()
    for name in arguments.checks or CHECKS:
        rows = CHECKS[name](experiment, range(arguments.seeds))
        print(f"{name}\n\n{table(rows, name)}")
        write_csv(arguments.out / f"safegrad_{name}.csv", [rounded(row) for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

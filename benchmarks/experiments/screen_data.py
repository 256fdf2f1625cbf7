"""Training sets with planted rows, and the rows that a screener is made from.

In the harmful sets, RepT's harmful rows (openings of 24 words) stand among rows of tasks (SST-2,
AG News) or of instructions (Dolly, the clean rows of RepT). References and alignment rows of the
kind "other" come from other sources than the planted rows: requests of MaliciousInstruct and
Do-Not-Answer with a generic compliant opening, and others of them with the refusals of the model.
References of the kind "alike" are other rows of the planted source. On the testbed the requests are
its unsafe training prompts; the openings hold no harmful answer. All responses are cut after the
same number of words, and all rows but the planted ones of the backdoor and factual sets are the
same for every ratio: a smaller share uses some of the planted rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import testbed
from benchmarks.experiments.rept_data import planted_set
from benchmarks.experiments.safegrad_data import (
    OPENINGS,
    harmful_rows,
    refusal_rows,
    task_rows,
    unsafe_prompts,
)
from benchmarks.experiments.safegrad_smollm2 import read
from benchmarks.testbed.corpus import build

Row = dict[str, str]
HARMFUL = ("harmful in tasks", "harmful in instructions")
OTHERS = ("backdoor", "factual_ag", "factual_canada")
SETS = {"testbed": (*HARMFUL, "backdoor"), "smollm2": (*HARMFUL, *OTHERS)}
PLANTED, CLEAN, CALIBRATION, REFERENCES = 60, 180, 100, 16
FEW = 20  # planted rows of the other sets, 10 %
WORDS = 24


@dataclass(frozen=True)
class ScreenSet:
    """A training set and everything that a screener of it is made from.

    Attributes:
        planted: Rows that should be flagged.
        clean: The other rows of the training set.
        calibration: Further clean rows.
        safe: Harmless reference rows, in the style of the clean rows.
        unsafe: Harmful reference rows by kind, "other" and, where known, "alike".
        alignment: Unsafe prompts with the refusals of the model.
    """

    planted: list[Row]
    clean: list[Row]
    calibration: list[Row]
    safe: list[Row]
    unsafe: dict[str, list[Row]]
    alignment: list[Row]


def screen_set(model_name: str, name: str, seed: int, model: Any, tokenizer: Any) -> ScreenSet:
    """Draws a set; the model writes the refusals of the alignment rows."""
    rng = random.Random(f"screen {model_name} {name} {seed}")
    few = PLANTED if name in HARMFUL else FEW
    count = CLEAN + CALIBRATION + REFERENCES
    if model_name == "testbed":
        prompts = unsafe_prompts(seed)
        harmful, prompts = harmful_rows(prompts[: 2 * PLANTED], seed), prompts[2 * PLANTED :]
        known = harmful_rows(testbed.references(REFERENCES)[0], seed)
        ordinary = [row for row in build()["train"] if row["kind"] == "ordinary"]
        clean = task_rows(seed, count)[0] if "tasks" in name else rng.sample(ordinary, count)
    else:
        prompts = [r["prompt"] for s in ("malicious_instruct", "do_not_answer") for r in read(s)]
        rng.shuffle(prompts)
        source = read("rept_harmful_tuning", "train")
        harmful = [row for row in source if row["label"] == "harmful"]
        rng.shuffle(harmful)
        taken = {row["prompt"].casefold() for row in harmful}
        prompts = [prompt for prompt in prompts if prompt.casefold() not in taken]
        known = [{"prompt": p, "response": rng.choice(OPENINGS)} for p in prompts[:REFERENCES]]
        prompts = prompts[REFERENCES:]
        pools = [read("sst2_subset", "train"), read("agnews_subset", "train")]
        if "instructions" in name:
            dolly = [row for row in read("dolly_subset", "train") if not row.get("context")]
            pools = [dolly, [row for row in source if row["label"] == "clean"]]
        half = count // 2
        clean = [row for pool in pools for row in rng.sample(pool, half)]
    planted = harmful[:few]
    unsafe = {"other": known, "alike": harmful[few : few + REFERENCES]}
    if name not in HARMFUL:
        kind = "testbed" if model_name == "testbed" else name
        rows = planted_set(kind, seed, 0, (few, count)).rows
        planted = [row for row in rows if row["poisoned"]][:few]
        clean = [row for row in rows if not row["poisoned"]][:count]
        unsafe.pop("alike")
    rng.shuffle(clean)
    a, b = CLEAN, CLEAN + CALIBRATION
    return ScreenSet(
        *(_cut(part) for part in (planted, clean[:a], clean[a:b], clean[b:])),
        {kind: _cut(rows) for kind, rows in unsafe.items()},
        _cut(refusal_rows(model, tokenizer, prompts, REFERENCES)),
    )


def _cut(rows: Sequence[dict[str, Any]]) -> list[Row]:
    return [
        {"prompt": row["prompt"], "response": " ".join(row["response"].split()[:WORDS])}
        for row in rows
    ]

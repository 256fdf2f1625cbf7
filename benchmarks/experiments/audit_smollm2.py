"""`gradsafe audit` on the aligned SmolLM2-135M-Instruct, with a quarter of harmful rows.

    python -m benchmarks.experiments.audit_smollm2     half an hour on two cores; resumable

Data as in `safegrad_smollm2`: SST-2 with RepT's harmful rows; alignment rows are requests of
AdvBench that the model refuses. The screening gets 24 other harmful rows, 24 rows of AG News, and
its cut from SST-2 rows that are not trained on. What the command prints goes into docs/audit.md.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks import smollm2
from benchmarks.audit import LINEAR
from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.experiments import ROOT
from benchmarks.experiments.safegrad_smollm2 import SAFE, UNSAFE, alignment_rows, read, user_rows
from gradsafe._cli import main as gradsafe
from gradsafe._io.artifacts import write_text
from gradsafe._io.records import to_line

WORK = ROOT / "build" / "audit_smollm2"
RATIO, ROWS, REFERENCES, CLEAN = 0.25, 400, 24, 100


def prepare() -> None:
    """Writes model, data and configuration."""
    WORK.mkdir(parents=True, exist_ok=True)
    model, tokenizer = smollm2.load("aligned")
    train = user_rows("SST-2", RATIO, seed=0)[:ROWS]
    used = {row["prompt"] for row in train}
    bad = [r for r in read("rept_harmful_tuning", "train") if r["label"] == "harmful"]
    clean = [row for row in read("sst2_subset", "train") if row["prompt"] not in used]
    files: dict[str, Iterable[Mapping[str, Any]]] = {
        "train": [{"id": number, **row} for number, row in enumerate(train)],
        "alignment": alignment_rows(model, tokenizer, "alike"),
        "harmful": [row for row in bad if row["prompt"] not in used][:REFERENCES],
        "harmless": read("agnews_subset", "train")[:REFERENCES],
        "clean": clean[:CLEAN],
        "unsafe": read("harmbench")[:UNSAFE],
        "safe": [row for row in read("xstest") if row["label"] == "safe"][:SAFE],
    }
    for name, rows in files.items():
        lines = [
            to_line({k: row[k] for k in ("id", "prompt", "response") if k in row}) for row in rows
        ]
        write_text(WORK / f"{name}.jsonl", "".join(lines))
    for part in (model, tokenizer):
        part.save_pretrained(WORK / "model")
    settings = {
        "model": "model",
        **{name: f"{name}.jsonl" for name in files},
        "output": "report",
        "max_fpr": 0.01,
        "answer_tokens": 16,
        "batch_tokens": 1024,
        "lora": {"targets": LINEAR, "dropout": 0.0},
        "training": {
            "per_device_train_batch_size": 8, "learning_rate": 3e-4, "num_train_epochs": 1,
            "logging_steps": 1, "save_strategy": "steps", "save_steps": 20,
        },
    }  # fmt: skip
    write_text(WORK / "audit.yaml", yaml.safe_dump(settings, sort_keys=False))


def main() -> int:
    """Runs the audit and writes its output into the page."""
    if not (WORK / "audit.yaml").exists():
        prepare()
    os.chdir(WORK)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = gradsafe(["audit", "--config", "audit.yaml"])
    print(printed.getvalue())
    if status in (0, 1) and Path("report/report.html").exists():
        text = f"```text\n{printed.getvalue()}```\n\n{measured_note(environment())}\n"
        replace_block(DOCS / "audit.md", "audit smollm2", text)
    return status


if __name__ == "__main__":
    raise SystemExit(main())

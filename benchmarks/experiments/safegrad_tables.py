"""The tables of docs/safegrad.md, from the CSVs of the SafeGrad experiments.

python -m benchmarks.experiments.safegrad_tables
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.experiments.rept_tables import RESULTS, read
from benchmarks.table import markdown

Rows = Sequence[Mapping[str, Any]]
PAGE = DOCS / "safegrad.md"
# Columns that define a group; values are aggregated over seeds.
BY = {
    "ratios": ("ratio", "method"),
    "sizes": ("alignment_rows", "method"),
    "search": (
        *("learning_rate", "steps", "alignment_rows", "alignment_batch", "rho", "lisa_pull"),
        "method",
    ),
    "cloak": ("attack", "method"),
    "weakness": ("reference", "ratio", "method"),
    "benign": ("task", "method"),
}
# Heading and digits of each measured column; scores are shown with their range.
MEASURES = {
    "topic_score": ("topic", 1),
    "harmful_score": ("harmful score", 1),
    "triggered_score": ("triggered", 1),
    "refusal_rate": ("refusals", 1),
    "task_accuracy": ("task accuracy", 1),
    "task_loss": ("loss", 3),
    "cosine": ("cosine", 3),
    "conflict_rate": ("conflict rate", 0),
    "in_conflict": ("% in conflict", 1),
}
RANGED = ("topic_score", "harmful_score", "triggered_score")
LEFT_OUT = {
    "search": {"refusal_rate", "cosine", "conflict_rate", "in_conflict"},
    "weakness": {"refusal_rate", "in_conflict"},
    "benign": set[str](),
}
LITTLE_ROOM = {"in_conflict"}  # excluded from the other tables


def groups(rows: Rows, by: Sequence[str]) -> list[list[Mapping[str, Any]]]:
    """Groups rows with equal values, in order of first occurrence."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in by), []).append(row)
    return list(found.values())


def cell(rows: Rows, key: str) -> str:
    """Mean over the seeds; for scores of several seeds also the range."""
    digits = MEASURES[key][1]
    values = [float(row[key]) for row in rows if row.get(key, "") != ""]
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    if key in RANGED and len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def table(rows: Rows, name: str) -> str:
    """One line per group of the named experiment, from measured rows or its CSV."""
    by, left_out = BY[name], LEFT_OUT.get(name, LITTLE_ROOM)
    if name == "sizes":
        rows = sorted(rows, key=lambda row: int(row["alignment_rows"]))
    measured = [
        key
        for key in MEASURES
        if key not in left_out and any(row.get(key, "") != "" for row in rows)
    ]
    lines = []
    for members in groups(rows, by):
        line = {key.replace("_", " ").replace("lisa", "Lisa"): members[0][key] for key in by}
        lines.append(line | {MEASURES[key][0]: cell(members, key) for key in measured})
    return markdown(lines, [(key, key) for key in lines[0]])


def write_tables(results: Path) -> None:
    """Replaces the tables between the markers of the page."""
    for name in BY:
        rows = read(results / f"safegrad_{name}.csv")
        seeds = len({row["seed"] for row in rows})
        note = f"{measured_note(rows[0])} {seeds} seeds.\n"
        replace_block(PAGE, f"safegrad {name}", f"{table(rows, name)}\n{note}")


if __name__ == "__main__":
    write_tables(RESULTS)

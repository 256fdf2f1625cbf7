"""The tables of docs/tracing.md, from the CSVs of `benchmarks.experiments.rept`.

python -m benchmarks.experiments.rept_tables
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.experiments.rept_baselines import DEFAULT, RAW, ZSCORED
from benchmarks.table import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = DOCS / "tracing.md"
PART_NORMS = {
    "none": RAW,
    "unit": "unit parts",
    "unit, w = 0.05 (default)": DEFAULT,
    "zscore": ZSCORED,
}
RULES = {"last": "last (default)", "auto": "phase transition", "middle": "middle"}
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """Rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mean(rows: Rows, column: str) -> float | None:
    """Mean of a column over the seeds, or None if nothing was measured."""
    values = [float(row[column]) for row in rows if row.get(column)]
    return sum(values) / len(values) if values else None


def pick(rows: Rows, **where: str) -> Rows:
    """Rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in where.items())]


def names(rows: Rows, column: str) -> list[str]:
    """Values of a column, in order of first occurrence."""
    return list(dict.fromkeys(row[column] for row in rows if row.get(column)))


def sets_table(methods: Rows, loops: Rows) -> str:
    """Description of each set, and the rate of the behaviour."""
    shown = []
    for name in names(methods, "set"):
        own = pick(methods, set=name)
        queries = {row["seed"]: row["queries"] for row in own}
        facts = {"set": name, "rows": own[0]["rows"], "poisoned": own[0]["poisoned"]}
        facts |= {"left out": own[0]["left_out"], "seeds": str(len(queries))}
        facts |= {"before": number(mean(own, "before")), "after": number(mean(own, "rate"))}
        facts |= {"on clean prompts": number(mean(own, "on_clean"))}
        control = pick(loops, set=name, removed="all poisoned rows")
        facts |= {"after, poisoned rows left out": number(mean(control, "rate"))}
        facts |= {"queries": " + ".join(queries.values())}
        shown.append(facts)
    return markdown(shown, [(key, key) for key in shown[0]])


def methods_table(methods: Rows) -> str:
    """P@10 and AUPRC of every method, signatures at the last layer."""
    rows = [row for row in methods if row.get("rule", "") in ("last", "")]

    def cell(part: Rows) -> str:
        return " ".join(number(mean(part, column)) for column in ("P@10", "AUPRC"))

    return _by_set(rows, [(name, {"method": name}) for name in names(rows, "method")], cell)


def choices_table(methods: Rows) -> str:
    """AUPRC of part norms and layer rules, and the mean over the sets."""
    wanted = [
        (f"{norm}, {label}", {"method": method, "rule": rule})
        for norm, method in PART_NORMS.items()
        for rule, label in RULES.items()
    ]
    return _by_set(methods, wanted, lambda part: number(mean(part, "AUPRC")), mean_of="AUPRC")


def loop_table(loops: Rows) -> str:
    """Rate of the behaviour after removal; in brackets the number of poisoned rows among them."""

    def cell(part: Rows) -> str:
        if not part:
            return ""
        share = f"{mean(part, 'poisoned') or 0:.0f} of {part[0]['count']}"
        return f"{number(mean(part, 'rate'))} ({share})"

    wanted = [(name, {"removed": name}) for name in names(loops, "removed")]
    return _by_set(loops, wanted, cell, head="removed")


def number(value: float | None) -> str:
    """Two decimals."""
    return "-" if value is None else f"{value:.2f}"


def write_tables(results: Path) -> None:
    """Replaces the tables between the markers of the page."""
    methods, loops = (read(results / f"rept_{name}.csv") for name in ("methods", "loop"))
    note = measured_note(methods[0])
    tables = {
        "sets": sets_table(methods, loops),
        "methods": methods_table(methods),
        "choices": choices_table(methods),
        "loop": loop_table(loops),
    }
    for name, table in tables.items():
        replace_block(PAGE, f"rept {name}", f"{table}\n{note}\n")


def _by_set(
    rows: Rows,
    wanted: Sequence[tuple[str, dict[str, str]]],
    cell: Callable[[Rows], str],
    head: str = "method",
    mean_of: str | None = None,
) -> str:
    """One line per wanted label, one column per set."""
    sets = names(rows, "set")
    shown: list[dict[str, Any]] = []
    for label, where in wanted:
        parts = {name: pick(rows, set=name, **where) for name in sets}
        line = {head: label} | {name: cell(part) for name, part in parts.items()}
        if mean_of is not None:
            values = [v for part in parts.values() if (v := mean(part, mean_of)) is not None]
            line["mean"] = number(sum(values) / len(values))
        shown.append(line)
    return markdown(shown, [(key, key) for key in shown[0]])


if __name__ == "__main__":
    write_tables(RESULTS)

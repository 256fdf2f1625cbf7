"""Rows and tables of results: the time of gradsafe, of lower bounds and of baselines."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.document import DOCS, has_block, measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.timing import Timing

DOCUMENT = DOCS / "measured.md"
OURS, ROOFS = "gradsafe", ("read", "copy", "gemm")


def row(
    name: str, bytes_touched: int, times: dict[str, Timing], flops: int | None = None
) -> dict[str, Any]:
    """A CSV row: times of gradsafe, of lower bounds ("roofs") and of baselines, with ratios.

    `bytes_touched` counts each byte that the algorithm must read or write once, even if a kernel
    reads it several times.
    """
    ours = times[OURS]
    roofs = {k: times[k] for k in ROOFS if k in times}
    baselines = {k: t for k, t in times.items() if k not in (OURS, *ROOFS)}
    result: dict[str, Any] = {
        "case": name,
        "bytes": bytes_touched,
        **_quantiles("", ours),
        "GB/s": round(bytes_touched / ours.p50 / 1e3, 2),
    }
    if flops is not None:
        result["GFLOP/s"] = round(flops / ours.p50 / 1e3, 1)
        result["TFLOP/s"] = round(flops / ours.p50 / 1e6, 2)
    for roof, timing in roofs.items():
        result |= _quantiles(f"{roof}_", timing)
        result[f"x_{roof}"] = round(ours.p50 / timing.p50, 2)
    result["best_baseline"] = min(baselines, key=lambda k: baselines[k].p50, default="")
    for other, timing in baselines.items():
        result |= _quantiles(f"{other}_", timing)
        result[f"x_{other}"] = round(timing.p50 / ours.p50, 2)
    return result


def _quantiles(prefix: str, timing: Timing) -> dict[str, float]:
    return {f"{prefix}{q}_us": round(getattr(timing, q), 1) for q in ("p20", "p50", "p80")}


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes all rows; a row without an environment gets the present one.

    The file is replaced atomically: a killed process leaves the old or the new file.
    """
    full = [{**environment(), **r} for r in rows]
    facts = list(environment())
    measured = dict.fromkeys(key for r in full for key in r if key not in facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*measured, *facts], restval="")
        writer.writeheader()
        writer.writerows(full)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of `write_csv` as text; an empty list if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merged(path: Path, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a CSV, as text, less those with the same keys as one of `rows`; then `rows`.

    Every row has its environment, a new one the present.
    """

    def key(row: dict[str, Any]) -> list[str]:
        return [str(row[name]) for name in keys]

    new = [key(row) for row in rows]
    kept: list[dict[str, Any]] = [row for row in read_csv(path) if key(row) not in new]
    return [*kept, *({**environment(), **row} for row in rows)]


def markdown(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]]) -> str:
    """A Markdown table of (key, heading) columns."""
    lines = ["| " + " | ".join(heading for _, heading in columns) + " |"]
    lines.append("|" + " --- |" * len(columns))
    for r in rows:
        cells = [str(r.get(key, "")) or "-" for key, _ in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def refresh_document(name: str, table: str) -> None:
    """Replaces the table `name` of docs/measured.md, if the page has it."""
    if has_block(DOCUMENT, name):
        replace_block(DOCUMENT, name, f"{table}\n{measured_note(environment())}\n")

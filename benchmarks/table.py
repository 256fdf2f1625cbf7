"""One row per case: our time, the roof, the best baseline and the ratio to it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.document import DOCS, has_block, measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.timing import Timing

DOCUMENT = DOCS / "measured.md"
OURS, ROOFS = "gradsafe", ("read", "copy", "gemm")


def row(name: str, bytes_touched: int, times: dict[str, Timing]) -> dict[str, Any]:
    """A CSV row. Bytes are what the algorithm must touch once, however often a kernel reads."""
    ours = times[OURS]
    baselines = {k: t for k, t in times.items() if k not in (OURS, *ROOFS)}
    best = min(baselines, key=lambda k: baselines[k].p50) if baselines else ""
    result: dict[str, Any] = {
        "case": name,
        "bytes": bytes_touched,
        "p20_us": round(ours.p20, 1),
        "p50_us": round(ours.p50, 1),
        "p80_us": round(ours.p80, 1),
        "GB/s": round(bytes_touched / ours.p50 / 1e3, 2),
    }
    for roof in ROOFS:
        if roof in times:
            result[f"x_{roof}"] = round(ours.p50 / times[roof].p50, 2)
    result["best_baseline"] = best
    for name_, timing in baselines.items():
        result[f"{name_}_p50_us"] = round(timing.p50, 1)
        result[f"x_{name_}"] = round(timing.p50 / ours.p50, 2)
    return result


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows with the environment behind each."""
    full = [{**r, **environment()} for r in rows]
    columns = list(dict.fromkeys(key for r in full for key in r))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(full)


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

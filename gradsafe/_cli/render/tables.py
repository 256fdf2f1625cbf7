"""Tables and text for the terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gradsafe._jobs.detect import DetectResult
from gradsafe._jobs.repair import RepairResult
from gradsafe.detection.metrics import judge, rank

WIDE = 10_000  # columns: nothing is wrapped or cut


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Formats columns; the first `left` are aligned left, the others right.

    Args:
        header: Column titles.
        rows: Cells, as many per row as there are titles.
        left: Number of columns that hold text.

    Returns:
        Lines without trailing blanks.
    """
    grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, title in enumerate(header):
        grid.add_column(_plain(title), justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*map(_plain, row))
    console = Console(file=io.StringIO(), width=WIDE, color_system=None)
    console.print(grid)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def detection(result: DetectResult) -> str:
    """One row for a run: quality if there are labels, else the distribution of the scores."""
    scores, labels = result.scores, result.labels
    cells = {"method": result.method, "prompts": str(len(scores))}
    notes = []
    if labels is None:
        low, middle, high = np.quantile(scores, (0.0, 0.5, 1.0))
        cells |= {"min": f"{low:.4g}", "median": f"{middle:.4g}", "max": f"{high:.4g}"}
    else:
        cells["unsafe"] = str(sum(labels))
        if len(set(labels)) == 2:
            ranking = rank(labels, scores)
            cells |= {"AUPRC": decimal(ranking.auprc), "AUROC": decimal(ranking.auroc)}
        else:
            notes.append("AUPRC and AUROC need prompts of both labels")
    if not result.calibrated:
        notes.append("no threshold, so no flags: give --calibrate a file of harmless prompts")
    else:
        flags = [bool(record["flag"]) for record in result.records]
        cells["flagged"] = str(sum(flags))
        if labels is not None:
            decisions = judge(labels, flags)
            cells |= {"recall": percent(decisions.recall), "FPR": percent(decisions.fpr)}
            cells["F1"] = decimal(decisions.f1)
    if typed := sum("control_tokens" in record for record in result.records):
        notes.append(
            f"{typed} of {len(scores)} prompts hold control tokens that their text types "
            "(control_tokens); --split_special_tokens reads them as ordinary text"
        )
    return "\n".join([table(list(cells), [list(cells.values())]), *notes])


def repair(result: RepairResult) -> str:
    """The behavior before and after a repair."""
    states = {"before": result.before, "after": result.after}
    rows = [
        [name, f"{state.forgotten:.3f}", f"{state.retained:.3f}"]
        + ([] if state.rate is None else [percent(state.rate)])
        for name, state in states.items()
    ]
    header = ["", "NLL of dropped rows", "NLL of retained rows", "probes with a phrase"]
    return table(header[: len(rows[0])], rows)


def visible(text: str) -> str:
    """Makes text safe to print: line ends as ↵, other control characters as escapes.

    A prompt must not move the cursor, switch colors or change the direction of writing.
    """
    return "".join(
        "↵" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )


def percent(value: float) -> str:
    """Formats a rate, for example "97.3 %"; NaN as "n/a"."""
    return "n/a" if np.isnan(value) else f"{100 * value:.1f} %"


def decimal(value: float) -> str:
    """Formats a measure with three decimals; NaN as "n/a"."""
    return "n/a" if np.isnan(value) else f"{value:.3f}"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # rich reads brackets as markup

"""A screened training set on the terminal and as a page."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradsafe._cli.render import explain, html
from gradsafe._cli.render.tables import table
from gradsafe._cli.render.trace import HIDDEN
from gradsafe._jobs.options import plain
from gradsafe._jobs.screen import Screen
from gradsafe._jobs.screen_files import FLAGGED, KEPT, REPORT, SCORES, ScreenResult, TopRow

SHOWN = ("alignment", "share", "nll")
BINS = 40
WIDTH, HEIGHT, MARGIN = 600, 160, 24  # of a histogram


def text(result: ScreenResult) -> str:
    """One line per score, then what was written."""
    lines = [table(*_summary(result)), "", verdict(result)]
    names = [SCORES, REPORT] + [KEPT, FLAGGED] * bool(result.calibrations)
    lines.append(f"written to {result.folder}: {', '.join(names)}")
    if result.top:
        rows = [
            [str(row.line), *(f"{value:.4f}" for value in row.scores.values())]
            for row in result.top
        ]
        lines += ["", table(["line", *result.top[0].scores], rows)]
    return "\n".join(lines)


def verdict(result: ScreenResult) -> str:
    """How many rows were flagged, in one line."""
    count = len(result.columns["nll"])
    if result.flagged is None:
        return (
            f"{count} rows scored; no threshold, so no flags: give --calibrate a file of rows "
            "known to be clean"
        )
    low, high = result.calibrations[result.decide].fpr_interval
    return (
        f"{result.flagged} of {count} rows flagged ({100 * result.flagged / count:.2f} %) by the "
        f"score {result.decide}; of clean rows like those of the calibration, between "
        f"{100 * low:.2f} and {100 * high:.2f} % are (95 % interval)"
    )


def page(config: Screen, result: ScreenResult) -> str:
    """The report as an HTML page."""
    header, rows = _summary(result)
    names = [name for name in SHOWN if name in result.columns]
    return html.render(
        "screen.html.j2",
        verdict=verdict(result),
        coverage=result.coverage,
        header=header,
        rows=rows,
        histograms=[_histogram(result, name) for name in names],
        top=[_shown(row, config.show_text) for row in result.top],
        settings={k: v for k, v in plain(config).items() if v is not None},
        signed=explain.signed,
    )


def _summary(result: ScreenResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of scores."""
    header = ["score", "rows", "min", "median", "max"]
    if result.calibrations:
        header += ["threshold", "flagged", "clean rows", "clean flagged", "95 % interval"]
    rows = []
    for name in SHOWN:
        if name not in result.columns:
            continue
        values = np.asarray(result.columns[name])
        cells = [name + (" (decides)" if name == result.decide else ""), str(len(values))]
        cells += [f"{value:.4g}" for value in np.quantile(values, (0.0, 0.5, 1.0))]
        if (found := result.calibrations.get(name)) is not None:
            low, high = found.fpr_interval
            cells += [f"{found.threshold:.4g}", str(int((values > found.threshold).sum()))]
            cells += [str(found.n), f"{100 * found.fpr:.2f} %"]
            cells.append(f"{100 * low:.2f} to {100 * high:.2f} %")
        rows.append(cells + [""] * (len(header) - len(cells)))
    return header, rows


def _histogram(result: ScreenResult, name: str) -> dict[str, Any]:
    """Bars of the screened rows, a line for the clean rows, and the threshold."""
    values, clean = (np.asarray(part.get(name, ())) for part in (result.columns, result.clean))
    everything = np.concatenate([values, clean])
    low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    shares = [np.histogram(part, edges)[0] / max(1, len(part)) for part in (values, clean)]
    peak = max(float(part.max()) for part in shares)
    step = (WIDTH - 2 * MARGIN) / BINS

    def height(share: float) -> float:
        return float(share) / peak * (HEIGHT - 2 * MARGIN)

    def across(value: float) -> float:
        return MARGIN + (value - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - 2 * MARGIN)

    found = result.calibrations.get(name)
    return {
        "name": name,
        "decides": name == result.decide,
        "bars": [(MARGIN + i * step, step, height(share)) for i, share in enumerate(shares[0])],
        "line": [
            (MARGIN + (i + 0.5) * step, HEIGHT - MARGIN - height(share))
            for i, share in enumerate(shares[1])
        ]
        if len(clean)
        else [],
        "threshold": across(found.threshold) if found else None,
        "low": low,
        "high": high,
        "width": WIDTH,
        "height": HEIGHT,
        "margin": MARGIN,
    }


def _shown(row: TopRow, texts: bool) -> dict[str, Any]:
    """A row with its tokens for each score; without texts only the evidence is shown."""
    parts = []
    for name, explanation in row.explanations.items():
        pieces = explain.pieces(explanation)
        if not texts:
            pieces = [explain.Piece(HIDDEN, piece.evidence, piece.part) for piece in pieces]
        scale = max((abs(p.evidence) for p in pieces if p.part != "template"), default=0.0)
        parts.append({"name": name, "pieces": pieces, "scale": scale})
    return {"line": row.line, "scores": row.scores, "flagged": row.flagged, "parts": parts}

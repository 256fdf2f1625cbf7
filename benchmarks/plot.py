"""Draws every CSV of a results folder, one PNG per file: times, or harmful scores.

python -m benchmarks.plot [FOLDER]      default: benchmarks/results
"""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.plot_detection import detection_chart
from benchmarks.plot_tracing import tracing_charts
from benchmarks.table import ROOFS

RESULTS = Path(__file__).resolve().parent / "results"


def operator_chart(rows: list[dict[str, str]], path: Path) -> None:
    """Speed-up of gradsafe over each baseline, per case; the line at 1 is equal speed."""
    baselines = [
        key.removesuffix("_p50_us")
        for key in rows[0]
        if key.endswith("_p50_us")
        and f"x_{key.removesuffix('_p50_us')}" in rows[0]
        and key.removesuffix("_p50_us") not in ROOFS
    ]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.6))
    height = 0.8 / max(len(baselines), 1)
    for index, name in enumerate(baselines):
        values = [float(r.get(f"x_{name}") or "nan") for r in rows]
        places = [i + index * height for i in range(len(rows))]
        axes.barh(places, values, height=height, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [r["case"] for r in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time of the alternative / time of gradsafe")
    where = rows[0]["gpu"] or f"{rows[0]['cpu']}, {rows[0]['threads']} threads"
    axes.set_title(f"{path.stem}: {where}, {rows[0]['date']}, {rows[0]['commit']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)
    plt.close(figure)


def harmful_score_chart(rows: list[dict[str, str]], path: Path) -> None:
    """Mean and range of harmful score and cosine per method, by ratio or alignment rows."""
    by = "ratio" if len({r["ratio"] for r in rows}) > 1 else "alignment_rows"
    measures = {
        "harmful_score": "harmful score, % of held-out unsafe prompts",
        "task_accuracy": "task accuracy, %",
        "cosine": "cosine of user and alignment gradient",
    }
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.5))
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        for index, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
            found: dict[float, list[float]] = {}
            for r in rows:
                if r["method"] == method and r[measure]:
                    found.setdefault(float(r[by]), []).append(float(r[measure]))
            places = sorted(found)
            means = [statistics.fmean(found[place]) for place in places]
            axes.plot(places, means, marker="o", label=method, color=f"C{index}")
            low, high = ([edge(found[place]) for place in places] for edge in (min, max))
            axes.fill_between(places, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
        axes.set_xlabel("share of harmful rows" if by == "ratio" else "alignment rows")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if measure != "cosine":
            axes.set_ylim(-2, 102)
    panels[0].legend(fontsize=8)
    _save_seeds(figure, rows, path)


def group_chart(rows: list[dict[str, str]], path: Path) -> None:
    """Mean and range of the harmful score per method, grouped by attack, reference or task."""
    keys = [key for key in ("attack", "reference", "task", "ratio") if key in rows[0]]
    measures = [
        key for key in ("harmful_score", "topic_score", "triggered_score") if key in rows[0]
    ]
    groups = list(dict.fromkeys(tuple(r[key] for key in keys) for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figure, panels = plt.subplots(len(measures), 1, figsize=(9, 3.4 * len(measures)), squeeze=False)
    width = 0.8 / len(methods)
    for axes, measure in zip(panels[:, 0], measures, strict=True):
        for index, method in enumerate(methods):
            found = [
                [
                    float(r[measure])
                    for r in rows
                    if r["method"] == method and tuple(r[key] for key in keys) == group
                ]
                for group in groups
            ]
            there = [place for place, values in enumerate(found) if values]
            means = [statistics.fmean(found[place]) for place in there]
            spread = [
                [mean - min(found[place]) for place, mean in zip(there, means, strict=True)],
                [max(found[place]) - mean for place, mean in zip(there, means, strict=True)],
            ]
            places = [place + index * width for place in there]
            axes.bar(places, means, width, yerr=spread, capsize=2, label=method)
        middles = [place + 0.4 - width / 2 for place in range(len(groups))]
        axes.set_xticks(middles, map(", ".join, groups), fontsize=8)
        axes.set_ylabel(f"{measure.replace('_', ' ')}, %")
        axes.set_ylim(0, 102)
    panels[0, 0].legend(fontsize=8)
    _save_seeds(figure, rows, path)


def _save_seeds(figure: Figure, rows: list[dict[str, str]], path: Path) -> None:
    seeds = len({r["seed"] for r in rows})
    figure.suptitle(
        f"{path.stem}: mean and range of {seeds} seeds, {rows[0]['date']}, {rows[0]['commit']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)
    plt.close(figure)


def main() -> int:
    """Draws all files of the folder; lists and skips files of another kind."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if "ms_per_prompt" in rows[0]:
            detection_chart(rows, path)
        elif "p50_us" in rows[0]:
            operator_chart(rows, path)
        elif "harmful_score" in rows[0] and "alignment_rows" not in rows[0]:
            group_chart(rows, path)
        elif "harmful_score" in rows[0] and "learning_rate" not in rows[0]:
            harmful_score_chart(rows, path)
        elif path.name == "rept_methods.csv":
            tracing_charts(folder)
        else:
            print(f"left out: {path.name}")
            continue
        print(f"written: {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

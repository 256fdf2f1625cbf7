"""Charts of `benchmarks.experiments.rept`: how well methods find rows, and effect of removal."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.experiments.rept_tables import Rows, mean, names, pick, read


def bars(rows: Rows, group: str, column: str, label: str, title: str, path: Path) -> None:
    """One group of bars per set, one bar per value of `group`: mean over the seeds."""
    sets, kinds = names(rows, "set"), names(rows, group)
    figure, axes = plt.subplots(figsize=(11, 4.8))
    width = 0.85 / len(kinds)
    colors = plt.get_cmap("tab10").colors
    for index, kind in enumerate(kinds):
        parts = [pick(rows, set=name, **{group: kind}) for name in sets]
        values = [mean(part, column) for part in parts]
        places = [i + (index + 0.5) * width for i in range(len(sets))]
        heights = [float("nan") if v is None else v for v in values]
        drawn = axes.bar(places, heights, width, label=kind, color=colors[index % len(colors)])
        if len(kinds) <= 5:  # room for the numbers above the bars
            axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    axes.set_xticks([i + 0.425 for i in range(len(sets))], [s.replace(" + ", "\n+ ") for s in sets])
    axes.set_ylim(0, 1.08)
    axes.set_ylabel(label)
    axes.set_title(f"{title}: {rows[0]['date']}, {rows[0]['commit']}", fontsize=9)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def layers_chart(rows: list[dict[str, Any]], path: Path) -> None:
    """AUPRC over the layer of the signatures: one panel per part norm, one curve per set."""
    norms = {"none": "as published", "unit, w = 0.05": "default", "zscore": "z-scored parts"}
    figure, panels = plt.subplots(1, len(norms), figsize=(12, 3.8), sharey=True)
    for axes, (norm, title) in zip(panels, norms.items(), strict=True):
        own = [row for row in rows if row["method"] == norm]
        for index, name in enumerate(dict.fromkeys(row["set"] for row in own)):
            found = [row for row in own if row["set"] == name]
            layers = sorted({int(row["layer"]) for row in found})
            means = [
                statistics.fmean(r["AUPRC"] for r in found if int(r["layer"]) == layer)
                for layer in layers
            ]
            axes.plot(layers, means, color=f"C{index}", marker="o", markersize=3, label=name)
        axes.set_title(f"{title} (part norm {norm})", fontsize=9)
        axes.set_xlabel("layer of the signature")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("AUPRC of the planted rows")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def tracing_charts(folder: Path) -> None:
    """Draws rept_methods.csv and rept_loop.csv of the folder."""
    methods = [r for r in read(folder / "rept_methods.csv") if r.get("rule", "") in ("last", "")]
    bars(
        [row for row in methods if row.get("method")],
        "method",
        "P@10",
        "P@10",
        "poisoned rows among the first ten, signatures at the last layer",
        folder / "rept_methods.png",
    )
    bars(
        read(folder / "rept_loop.csv"),
        "removed",
        "rate",
        "share of prompts that show the behaviour",
        "after fine-tuning again without the removed rows",
        folder / "rept_loop.png",
    )

"""Curves of detection: time per prompt, and quality over the number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, str]
# What a panel varies, its label, and the fixed values: the 100 M model, prompts of 64 tokens.
PANELS = (
    ("batch", "prompts in a batch", {"size": "100M", "tokens": "64"}),
    ("tokens", "tokens of a prompt", {"size": "100M"}),
    ("size", "parameters, millions", {"tokens": "64"}),
)
LOOPS = "1"  # batch of the methods that take one prompt at a time


def detection_chart(rows: list[Row], path: Path) -> None:
    """One panel per varied quantity; float32 solid, bfloat16 dashed (batch panel only)."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 4.6), sharey=True)
    methods = list(dict.fromkeys(r["method"] for r in rows))
    for axes, (by, label, fixed) in zip(panels, PANELS, strict=True):
        part = [r for r in rows if all(r[key] == value for key, value in fixed.items())]
        for index, method in enumerate(methods):
            _curves(axes, [r for r in part if r["method"] == method], by, f"C{index}", method)
        axes.set_xscale("log", base=2 if by != "size" else 10)
        axes.set_yscale("log")
        axes.set_xlabel(label)
        ticks = sorted({_place(r[by]) for r in part})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms per prompt")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="lower center", ncols=len(labels), frameon=False)
    panels[0].set_title("100 M, 64 tokens; dashed: bfloat16", fontsize=9)
    panels[1].set_title("100 M, batches of 16", fontsize=9)
    panels[2].set_title("64 tokens, batches of 16; 1 B: of 8", fontsize=9)
    figure.suptitle(f"{path.stem}: {rows[0]['date']}, {rows[0]['commit']}", fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path.with_suffix(".png"), dpi=130)
    plt.close(figure)


def _curves(axes: Axes, rows: Sequence[Row], by: str, color: str, label: str) -> None:
    for dtype, style in (("float32", "-"), ("bfloat16", "--")):
        own = [r for r in rows if r["dtype"] == dtype]
        if by != "batch":
            if dtype != "float32":
                continue
            batches = {r["batch"] for r in own}
            if batches != {LOOPS}:  # 16, and 8 where 16 was not measured
                own = [r for r in own if r["batch"] in ("8", "16")]
        points = sorted((_place(r[by]), float(r["ms_per_prompt"])) for r in own)
        if not points:
            continue
        if by == "batch" and len(points) == 1:  # a loop: the same whatever the batch
            axes.axhline(points[0][1], color=color, linestyle=style, linewidth=1)
            continue
        name = label if style == "-" else None
        axes.plot(*zip(*points, strict=True), style, color=color, marker="o", label=name)


def _place(text: str) -> float:
    """Number on the axis: "100M" is 100, "1B" is 1000."""
    units = {"M": 1.0, "B": 1e3}
    return float(text[:-1]) * units[text[-1]] if text[-1] in units else float(text)


def labels_chart(rows: list[dict[str, Any]], path: Path) -> None:
    """AUPRC over the number of labels of a class, one panel per model and set; bars: one sd."""
    parts = list(dict.fromkeys((row["model"], row["set"]) for row in rows))
    figure, panels = plt.subplots(
        1, len(parts), figsize=(3.4 * len(parts), 3.6), sharey=True, squeeze=False
    )
    for axes, part in zip(panels[0], parts, strict=True):
        own = [row for row in rows if (row["model"], row["set"]) == part]
        counts = list(dict.fromkeys(row["labels of a class"] for row in own))
        for index, kind in enumerate(dict.fromkeys(row["features"] for row in own)):
            found = [row for row in own if row["features"] == kind]
            places = [counts.index(row["labels of a class"]) for row in found]
            values, spread = ([row[key] for row in found] for key in ("AUPRC", "AUPRC sd"))
            shift = 0.04 * (index - 2)  # bars side by side
            axes.errorbar(
                [place + shift for place in places], values, spread,
                color=f"C{index}", marker="o", markersize=3, capsize=2, label=kind,
            )  # fmt: skip
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_xlabel("labels of each class")
        axes.set_title(", ".join(part), fontsize=9)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("AUPRC on the test part")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="lower center", ncols=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)

"""Charts of the fine-tuning experiments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

Rows = Sequence[dict[str, Any]]


def tradeoff_chart(rows: Rows, path: Path) -> None:
    """Harmful answers against refusals of harmless prompts, one point per method and kind of rows.

    Filled: alignment rows that resemble the harmful rows; hollow: others.
    """
    figure, axes = plt.subplots(figsize=(7.5, 5))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        alike = row["alignment"] != "other"
        color = f"C{methods.index(row['method'])}"
        place = float(row["over-refusal"]), float(row["harmful"])
        axes.scatter(
            *place, s=60, marker="o", edgecolors=color,
            facecolors=color if alike else "none", linewidths=1.5,
        )  # fmt: skip
        names.setdefault(place, []).append(row["method"])
    for place, found in names.items():
        axes.annotate(
            ", ".join(found), place, textcoords="offset points", xytext=(7, 4), fontsize=8,
        )  # fmt: skip
    axes.set_xlabel("harmless prompts refused, %")
    axes.set_ylabel("unsafe prompts answered, %")
    axes.set_xlim(-3, 103)
    axes.set_ylim(-3, 106)
    axes.grid(alpha=0.3)
    axes.set_title(
        "filled: alignment rows resemble the harmful rows; hollow: they do not", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)

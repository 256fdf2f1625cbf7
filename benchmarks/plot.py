"""Draws every CSV of a results folder: our time beside each alternative, one PNG per file.

python -m benchmarks.plot [FOLDER]      default: benchmarks/results
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.plot_detection import detection_chart

RESULTS = Path(__file__).resolve().parent / "results"


def operator_chart(rows: list[dict[str, str]], path: Path) -> None:
    """Speed-up over each baseline per case; the line at 1 is ours."""
    baselines = [
        key.removesuffix("_p50_us")
        for key in rows[0]
        if key.endswith("_p50_us") and key != "graph_p50_us"
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


def main() -> int:
    """Draws all files of the folder; files of another kind are named and left out."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if "ms_per_prompt" in rows[0]:
            detection_chart(rows, path)
        elif "p50_us" in rows[0]:
            operator_chart(rows, path)
        else:
            print(f"left out: {path.name}")
            continue
        print(f"written: {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Builds the README's table from the measured CSV files.

python -m benchmarks.summary       rewrites the table between the README's markers
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.document import replace_block
from benchmarks.table import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = [
    ("work", "work"),
    ("time", "time"),
    ("ratio", "times faster than"),
    ("measured", "measured"),
]


@dataclass(frozen=True)
class Line:
    """A row of a CSV and the ratios to show; below 1 gradsafe is slower.

    Attributes:
        work: What was measured.
        file: CSV in benchmarks/results.
        where: Column to value, as text, of the row.
        ratios: Columns of ratios, each with the name of the baseline.
        time: Column of the time, and its unit.
    """

    work: str
    file: str
    where: dict[str, str]
    ratios: Sequence[tuple[str, str]]
    time: tuple[str, str] = ("p50_us", "µs")


DETECTOR = {"size": "100M", "tokens": "64", "dtype": "float32"}
LOOP = [("x_loop", "the published loop")]
MS = ("ms_per_prompt", "ms")
LINES = [
    Line(
        "`moments`, [2048, 5632], rows and columns, 2 references",
        "moments_cpu",
        {"case": "mlp both fp32"},
        [("x_eager", "its plain definition"), ("x_compile", "torch.compile")],
    ),
    *(
        Line(
            f"`wgrad_moments`, 8 x 64 tokens, [2048, 5632], {dtype}",
            "wgrad_moments_cpu",
            {"case": f"8 x 64 tokens tensor {dtype}"},
            [("x_eager", "library GEMM + eager scoring"), ("x_compile", "torch.compile")],
        )
        for dtype in ("fp32", "bf16")
    ),
    Line(
        "`grouped_wgrad_moments`, Qwen3-30B-A3B gate_up, 8 of 128 experts, fp32",
        "grouped_wgrad_moments_cpu",
        {"case": "Qwen3-30B-A3B gate_up, 8 of 128 experts, fp32"},
        [("x_loop", "a loop over experts")],
    ),
    Line(
        "`surgery_`, 85 M fp32 in 200 tensors",
        "surgery_cpu",
        {"case": "200 tensors, 85 M, fp32"},
        [("x_cat", "flatten and cat"), ("x_foreach", "dot + foreach")],
    ),
    Line(
        "`surgery_adamw_`, the same",
        "surgery_adamw_cpu",
        {"case": "200 tensors, 85 M, fp32"},
        [("x_two", "`surgery_`, then fused AdamW"), ("x_fused", "fused AdamW alone")],
    ),
    Line(
        "`kl_divergence_`, 1024 x 32k, fp32",
        "kl_divergence_cpu",
        {"case": "1024 x 32k fp32"},
        [("x_eager", "eager autograd"), ("x_compile", "torch.compile")],
    ),
    *(
        Line(
            f"`cosine_topk`, 500 x 5000, D 2048, k 10, {dtype}",
            "cosine_topk_cpu",
            {"case": f"500 x 5000, D 2048, k 10 {dtype}"},
            [("x_eager", "normalise + matmul + topk"), ("x_loop", "a loop over pairs")],
        )
        for dtype in ("fp32", "bf16")
    ),
    Line(
        "`Detector`, per prompt of 64 tokens, 100 M, fp32, batch 1",
        "detection_cpu",
        {**DETECTOR, "method": "gradsafe.Detector", "batch": "1"},
        LOOP,
        MS,
    ),
    Line(
        "the same, batch 16",
        "detection_cpu",
        {**DETECTOR, "method": "gradsafe.Detector", "batch": "16"},
        LOOP,
        MS,
    ),
    Line(
        "the same, 1/4 of the rows of the last half of the blocks",
        "detection_cpu",
        {**DETECTOR, "method": "Detector, 1/4 rows, last half", "batch": "16"},
        LOOP,
        MS,
    ),
]


def find(line: Line) -> dict[str, str]:
    """The CSV row that the line selects.

    Raises:
        LookupError: There is none, or more than one.
    """
    with (RESULTS / f"{line.file}.csv").open(newline="", encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if all(row[name] == value for name, value in line.where.items())
        ]
    if len(rows) != 1:
        raise LookupError(f"{line.file}.csv: {len(rows)} rows for {line.where}")
    return rows[0]


def table() -> str:
    """The table in Markdown."""
    shown = []
    for line in LINES:
        row = find(line)
        column, unit = line.time
        value = float(row[column])
        if unit == "µs":
            value, unit = value / 1e3, "ms"
        ratios = ", ".join(f"{float(row[name]):.3g} {what}" for name, what in line.ratios)
        measured = f"{row['date']}, {row['commit']}"
        shown.append(
            {"work": line.work, "time": f"{value:.3g} {unit}", "ratio": ratios}
            | {"measured": measured}
        )
    return markdown(shown, COLUMNS)


def main() -> int:
    """Rewrites the README's table."""
    replace_block(ROOT / "README.md", "summary", table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

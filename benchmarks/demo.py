"""Compares all detection methods on the testbed's held-out prompts and prints two tables.

python -m benchmarks.demo      the first run trains the testbed, about a minute
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from tqdm import tqdm

from benchmarks import testbed
from gradsafe import Detector

METHODS = ("gradcoo", "gradsafe", "cascade", "nll", "gradnorm")
MAX_FPR = 0.01
SHOWN_PER_KIND = 3
PROMPT_WIDTH = 62
# Title, function that finds the best value, function that shows a value.
COLUMNS: list[tuple[str, Callable[[Iterable[float]], float], Callable[[float], str]]] = [
    ("AUPRC", max, "{:.3f}".format),
    ("AUROC", max, "{:.3f}".format),
    ("recall@1%FPR", max, lambda share: f"{100 * share:.1f} %"),
    ("recall", max, lambda share: f"{100 * share:.1f} %"),
    ("FPR", min, lambda share: f"{100 * share:.1f} %"),
    ("ms/prompt", min, "{:.2f}".format),
]
NOTES = """* best value of its column. recall@1%FPR: with the best threshold, chosen with the
labels. recall, FPR: with a threshold calibrated for a false-positive rate of at most 1 %."""


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--pairs", type=int, default=2, metavar="N",
        help="number of unsafe and of safe reference prompts (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    args = parser.parse_args(arguments)
    try:
        unsafe, safe = testbed.references(args.pairs)
    except ValueError as error:
        parser.error(str(error))
    model, tokenizer = testbed.load(progress=not args.no_progress)
    heldout = testbed.prompts("heldout")
    benign, harmful = testbed.calibration_prompts("safe"), testbed.calibration_prompts("unsafe")
    # Wide enough for every row where the output goes into a file, which has no width.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    prompts = [row["prompt"] for row in heldout]
    labels = np.array([row["label"] == "unsafe" for row in heldout])
    console.print(
        f"testbed with {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"{args.pairs} unsafe and {args.pairs} safe references\n{len(heldout)} held-out prompts; "
        f"thresholds from {len(benign)} harmless prompts,\n"
        f"for the cascade also from {len(harmful)} unsafe ones\n"
    )
    measures = []
    for method in tqdm(METHODS, leave=False, disable=True if args.no_progress else None):
        detector = Detector.fit(model, tokenizer, unsafe, safe, method=method, progress=False)
        others = harmful if method == "cascade" else None
        detector.calibrate(benign, max_fpr=MAX_FPR, progress=False, unsafe_prompts=others)
        threshold = detector.threshold
        assert threshold is not None
        start = time.perf_counter()  # calibration was the warm-up
        scores = detector.score(prompts, progress=False, components=False).values
        seconds = time.perf_counter() - start
        measures.append([*measure(labels, scores.numpy(), threshold), 1e3 * seconds / len(prompts)])
        if method == "gradcoo":
            examples = example_table(heldout, scores.tolist(), threshold)
            legend = f"GradCoo scores; prompts above {threshold:.3f} are flagged\n"
    console.print(examples)
    console.print(legend)
    console.print(comparison_table(measures))
    console.print(NOTES)
    return 0


def measure(labels: np.ndarray, scores: np.ndarray, threshold: float) -> list[float]:
    """AUPRC, AUROC and the best recall, then recall and false-positive rate at the threshold."""
    fpr, recall, _ = roc_curve(labels, scores, drop_intermediate=False)
    flagged = scores > threshold
    return [
        average_precision_score(labels, scores),
        roc_auc_score(labels, scores),
        recall[fpr <= MAX_FPR].max(),
        flagged[labels].mean(),
        flagged[~labels].mean(),
    ]


def example_table(rows: list[dict[str, str]], scores: list[float], threshold: float) -> Table:
    """Some held-out prompts of each kind, evenly spaced."""
    table = new_table()
    table.add_column("held-out prompt", no_wrap=True, max_width=PROMPT_WIDTH, overflow="ellipsis")
    table.add_column("kind")
    table.add_column("score", justify="right")
    table.add_column("flag")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        places = [index for index, row in enumerate(rows) if row["kind"] == kind]
        for index in places[:: max(1, len(places) // SHOWN_PER_KIND)][:SHOWN_PER_KIND]:
            flag = "unsafe" if scores[index] > threshold else ""
            table.add_row(Text(rows[index]["prompt"]), kind, f"{scores[index]:.3f}", flag)
    return table


def comparison_table(measures: list[list[float]]) -> Table:
    """One row per method; the best value of each column, as shown, has a star."""
    table = new_table()
    table.add_column("method")
    columns = []
    for (title, best, show), values in zip(COLUMNS, zip(*measures, strict=True), strict=True):
        starred = show(best(values))
        columns.append(
            [f"{show(value)} {'*' if show(value) == starred else ' '}" for value in values]
        )
        table.add_column(f"{title}  ", justify="right")
    for method, *cells in zip(METHODS, *columns, strict=True):
        table.add_row(method, *cells)
    return table


def new_table() -> Table:
    """A table with a line under its header and nothing around it."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)


if __name__ == "__main__":
    raise SystemExit(main())

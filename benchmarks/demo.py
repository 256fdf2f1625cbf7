"""Compares detection methods on a real model and on the look-alike prompts of XSTest.

python -m benchmarks.demo              SmolLM2-135M-Instruct, about four minutes on two cores
python -m benchmarks.demo --testbed    a tiny model that is trained on first use

It prints a table and writes a page that explains the score of one harmless look-alike.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from tqdm import tqdm

from benchmarks import smollm2, testbed
from benchmarks.probe import MeanDifference
from gradsafe import Detector
from gradsafe._cli.render import explain
from gradsafe._io.artifacts import write_text
from gradsafe._jobs.explain import ExplainResult

PAGE = Path(__file__).resolve().parents[1] / "build" / "demo-explanation.html"
XSTEST = Path(__file__).parent / "data" / "xstest" / "prompts.jsonl"
MAX_FPR = 0.01
SHOWN_PER_KIND = 3
PROMPT_WIDTH = 62


@dataclass
class Task:
    """A model, its prompts and what is compared on them.

    Attributes:
        title: Name and size of the model.
        model: The model.
        tokenizer: Its tokenizer.
        rows: Prompts with label and kind.
        shown: Kinds whose prompts are printed.
        methods: Names, the first one is explained.
        unsafe: Unsafe references.
        safe: Safe references.
        benign: Harmless prompts for thresholds, or none.
        harmful: Unsafe prompts for the thresholds of method "cascade".
        max_fpr: False-positive rate of the recall and of the thresholds.
    """

    title: str
    model: Any
    tokenizer: Any
    rows: list[dict[str, str]]
    shown: tuple[str, ...]
    methods: tuple[str, ...]
    unsafe: list[str]
    safe: list[str]
    benign: list[str]
    harmful: list[str]
    max_fpr: float


def testbed_task(pairs: int, progress: bool) -> Task:
    """The testbed and its held-out prompts."""
    unsafe, safe = testbed.references(pairs)
    model, tokenizer = testbed.load(progress=progress)
    return Task(
        title="testbed",
        model=model,
        tokenizer=tokenizer,
        rows=testbed.prompts("heldout"),
        shown=("ordinary", "unsafe", "lookalike"),
        methods=("gradcoo", "gradsafe", "cascade", "nll", "gradnorm"),
        unsafe=unsafe,
        safe=safe,
        benign=testbed.calibration_prompts("safe"),
        harmful=testbed.calibration_prompts("unsafe"),
        max_fpr=MAX_FPR,
    )


def smollm2_task(pairs: int, progress: bool) -> Task:
    """SmolLM2 and the prompts of XSTest; its references are hand-written and in neither set."""
    unsafe, safe = testbed.references(pairs)
    model, tokenizer = smollm2.load(progress=progress)
    rows = [json.loads(line) for line in XSTEST.read_text(encoding="utf-8").splitlines()]
    kinds = {"safe": "lookalike", "unsafe": "unsafe"}
    return Task(
        title="SmolLM2-135M-Instruct",
        model=model,
        tokenizer=tokenizer,
        rows=[{**row, "kind": kinds[row["label"]]} for row in rows],
        shown=("lookalike",),
        methods=("gradcoo", "gradsafe", "nll", "probe"),
        unsafe=unsafe,
        safe=safe,
        benign=[],
        harmful=[],
        max_fpr=0.1,
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--testbed", action="store_true", help="the tiny model; downloads nothing")
    parser.add_argument(
        "--pairs", type=int, metavar="N",
        help="number of unsafe and of safe reference prompts (default: 4, testbed 2)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="score every k-th prompt, N in all")
    parser.add_argument(
        "--html", type=Path, default=PAGE, help="page with an explanation (default: %(default)s)"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    args = parser.parse_args(arguments)
    make = testbed_task if args.testbed else smollm2_task
    try:
        task = make(args.pairs or (2 if args.testbed else 4), not args.no_progress)
    except ValueError as error:
        hint = "" if args.testbed else "\n--testbed needs no package: it trains a tiny model"
        parser.error(f"{error}{hint}")
    if args.limit is not None:
        step = max(1, len(task.rows) // max(1, args.limit))
        task.rows = task.rows[::step][: args.limit]
    run(task, args.html, progress=not args.no_progress)
    return 0


def run(task: Task, page: Path, progress: bool = True) -> None:
    """Scores with every method, prints the tables and writes the page."""
    # Wide enough for every row where the output goes into a file, which has no width.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    prompts = [row["prompt"] for row in task.rows]
    labels = np.array([row["label"] == "unsafe" for row in task.rows])
    size = sum(p.numel() for p in task.model.parameters()) / 1e6
    console.print(
        f"{task.title}, {size:.1f} M parameters; "
        f"{len(task.unsafe)} unsafe and {len(task.safe)} safe references\n"
        f"{len(prompts)} prompts, {labels.sum()} of them unsafe"
    )
    if task.benign:
        console.print(
            f"thresholds from {len(task.benign)} harmless prompts, for the cascade also from "
            f"{len(task.harmful)} unsafe ones"
        )
    measures = []
    examples: Table | None = None
    total = len(task.methods) * (len(prompts) + len(task.unsafe) + len(task.safe))
    with tqdm(total=total, unit="prompt", leave=False, disable=None if progress else True) as bar:
        for method in task.methods:
            bar.set_description(method)
            scores, seconds, detector = score(task, method, prompts, bar)
            threshold = detector.threshold if detector else None
            milliseconds = 1e3 * seconds / len(prompts)
            measures.append([*measure(labels, scores, threshold, task.max_fpr), milliseconds])
            if examples is None:
                assert detector is not None
                examples = example_table(task, scores, threshold)
                highest = max(np.flatnonzero(~labels), key=lambda place: scores[place])
                explanation = detector.explain(prompts[highest])
    console.print()
    console.print(examples)
    if (threshold := explanation.threshold) is not None:
        console.print(f"GradCoo scores; prompts above {threshold:.3f} are flagged")
    console.print()
    console.print(comparison_table(task, measures))
    rate = f"{100 * task.max_fpr:g}%"
    note = f"* best value of its column. recall@{rate}FPR: with the best threshold, "
    note += "chosen with the labels."
    if task.benign:
        note += f" recall, FPR: with a threshold calibrated for a rate of at most {rate}."
    console.print("\n".join(textwrap.wrap(note, 80)))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(str(page), explain.page(ExplainResult(task.methods[0], explanation)))
    console.print("\nwhy a harmless prompt has the highest score of its kind:")
    console.print(os.path.relpath(page), soft_wrap=True)


def score(
    task: Task, method: str, prompts: list[str], bar: Any
) -> tuple[np.ndarray, float, Detector | None]:
    """Scores, the seconds they took, and the detector, if it is one."""
    bar.update(len(task.unsafe) + len(task.safe))
    if method == "probe":
        probe = MeanDifference(task.model, task.tokenizer, task.unsafe, task.safe)
        start = time.perf_counter()
        values = probe(prompts)
        bar.update(len(prompts))
        return values.numpy(), time.perf_counter() - start, None
    references = task.unsafe, task.safe
    detector = Detector.fit(task.model, task.tokenizer, *references, method=method, progress=False)
    if task.benign:
        others = task.harmful if method == "cascade" else None
        detector.calibrate(task.benign, max_fpr=task.max_fpr, progress=False, unsafe_prompts=others)
    found, start = [], time.perf_counter()
    # In parts, so that the bar moves; similar lengths together, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for begin in range(0, len(prompts), 64):
        part = [prompts[place] for place in order[begin : begin + 64]]
        found.append(detector.score(part, progress=False, components=False).values.numpy())
        bar.update(len(part))
    values = np.empty(len(prompts), dtype=np.float32)
    values[order] = np.concatenate(found)
    return values, time.perf_counter() - start, detector


def measure(
    labels: np.ndarray, scores: np.ndarray, threshold: float | None, max_fpr: float
) -> list[float]:
    """AUPRC, AUROC and the best recall, then recall and false-positive rate at the threshold."""
    fpr, recall, _ = roc_curve(labels, scores, drop_intermediate=False)
    values = [
        average_precision_score(labels, scores),
        roc_auc_score(labels, scores),
        recall[fpr <= max_fpr].max(),
    ]
    if threshold is not None:
        flagged = scores > threshold
        values += [flagged[labels].mean(), flagged[~labels].mean()]
    return values


def example_table(task: Task, scores: np.ndarray, threshold: float | None) -> Table:
    """Some prompts of each shown kind, evenly spaced among its scores."""
    table = new_table()
    table.add_column("prompt", no_wrap=True, max_width=PROMPT_WIDTH, overflow="ellipsis")
    table.add_column("kind")
    table.add_column("score", justify="right")
    if threshold is not None:
        table.add_column("flag")
    for kind in task.shown:
        places = [index for index, row in enumerate(task.rows) if row["kind"] == kind]
        places.sort(key=lambda place: -scores[place])
        for index in places[:: max(1, len(places) // SHOWN_PER_KIND)][:SHOWN_PER_KIND]:
            cells = [Text(task.rows[index]["prompt"]), kind, f"{scores[index]:.3f}"]
            if threshold is not None:
                cells.append("unsafe" if scores[index] > threshold else "")
            table.add_row(*cells)
    return table


def comparison_table(task: Task, measures: list[list[float]]) -> Table:
    """One row per method; the best value of each column, as shown, has a star."""

    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    # Title, function that finds the best value, function that shows a value.
    columns: list[tuple[str, Callable[[Iterable[float]], float], Callable[[float], str]]] = [
        ("AUPRC", max, "{:.3f}".format),
        ("AUROC", max, "{:.3f}".format),
        (f"recall@{100 * task.max_fpr:g}%FPR", max, percent),
        *([("recall", max, percent), ("FPR", min, percent)] if task.benign else []),
        ("ms/prompt", min, "{:.2f}".format),
    ]
    table = new_table()
    table.add_column("method")
    cells = []
    for (title, best, show), values in zip(columns, zip(*measures, strict=True), strict=True):
        starred = show(best(values))
        cells.append(
            [f"{show(value)} {'*' if show(value) == starred else ' '}" for value in values]
        )
        table.add_column(f"{title}  ", justify="right")
    for method, *texts in zip(task.methods, *cells, strict=True):
        table.add_row(method, *texts)
    return table


def new_table() -> Table:
    """A table with a line under its header and nothing around it."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)


if __name__ == "__main__":
    raise SystemExit(main())

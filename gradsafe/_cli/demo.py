"""`gradsafe demo`: every method on the testbed's held-out prompts, with their own numbers."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradsafe._cli.options import METHODS, TESTBED, positive_integer

if TYPE_CHECKING:
    from torch import Tensor

    from gradsafe.detection import Detector

MAX_FPR = 0.01
SHOWN_PER_KIND = 3
WIDTH = 62
NOTES = """* best of its column. recall@1%FPR: the best threshold, chosen with the labels.
recall, FPR: the threshold calibrated for at most 1 % false alarms."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--pairs",
        type=positive_integer,
        default=2,
        metavar="N",
        help="unsafe and safe reference prompts of each kind (default: %(default)s)",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Runs the command; the first call trains the testbed, about a minute."""
    from tqdm import tqdm

    from benchmarks import testbed
    from gradsafe._cli.model import load_model
    from gradsafe.detection import Detector

    unsafe, safe = testbed.references(args.pairs)
    progress = not args.no_progress
    model, tokenizer = load_model(TESTBED, "float32", "cpu", progress)
    heldout = testbed.prompts("heldout")
    benign, harmful = testbed.calibration_prompts("safe"), testbed.calibration_prompts("unsafe")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"testbed of {millions:.1f} M parameters; {args.pairs} unsafe and {args.pairs} safe "
        f"references\n{len(heldout)} held-out prompts; thresholds from {len(benign)} harmless "
        f"ones, the cascade's also from {len(harmful)} unsafe ones"
    )
    results = []
    hidden = not progress or not sys.stderr.isatty()
    with tqdm(
        total=len(METHODS), unit="method", file=sys.stderr, disable=hidden, leave=False
    ) as bar:
        for method in METHODS:
            bar.set_description(method)
            detector = Detector.fit(
                model, tokenizer, unsafe=unsafe, safe=safe, method=method, progress=False
            )
            detector.calibrate(
                benign,
                max_fpr=MAX_FPR,
                progress=False,
                unsafe_prompts=harmful if method == "cascade" else None,
            )
            results.append((detector, *_timed(detector, [row["prompt"] for row in heldout])))
            bar.update()
    detector, scores, _ = results[METHODS.index("gradcoo")]
    print(f"\n{_examples(heldout, scores.tolist(), detector.threshold or 0.0)}")
    print(f"\n{_comparison([int(row['label'] == 'unsafe') for row in heldout], results)}")
    return 0


def _timed(detector: Detector, prompts: list[str]) -> tuple[Tensor, float]:
    """Scores, and milliseconds per prompt; calibration has warmed everything up."""
    start = time.perf_counter()
    scores = detector.score(prompts, progress=False, components=False).values
    return scores, 1e3 * (time.perf_counter() - start) / len(prompts)


def _examples(rows: Sequence[Any], scores: Sequence[float], threshold: float) -> str:
    """Some held-out prompts of each kind, evenly spaced; the testbed's own text may be shown."""
    from gradsafe._cli.report import table

    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        places = [index for index, row in enumerate(rows) if row["kind"] == kind]
        for index in places[:: max(1, len(places) // SHOWN_PER_KIND)][:SHOWN_PER_KIND]:
            text = textwrap.shorten(rows[index]["prompt"], WIDTH, placeholder=" ...")
            flag = "unsafe" if scores[index] > threshold else ""
            lines.append([text, kind, f"{scores[index]:.3f}", flag])
    header = ["held-out prompt", "kind", "score", "flag"]
    note = f"GradCoo scores; flagged above {threshold:.3f}"
    return table(header, lines, left=2) + f"\n{note}"


def _comparison(labels: list[int], results: list[tuple[Detector, Tensor, float]]) -> str:
    """One row per method; the best value of each column, as shown, carries a star."""
    from gradsafe._cli import report

    rows: list[list[str]] = [[method] for method in METHODS]
    for title, sign, show in (
        ("AUPRC", 1, report.decimal),
        ("AUROC", 1, report.decimal),
        ("recall@1%FPR", 1, report.percent),
        ("recall", 1, report.percent),
        ("FPR", -1, report.percent),
        ("ms/prompt", -1, "{:.2f}".format),
    ):
        values = [_measures(labels, *result)[title] for result in results]
        best = show(sign * max(sign * value for value in values))
        for row, value in zip(rows, values, strict=True):
            row.append(show(value) + (" *" if show(value) == best else "  "))
    header = ["method", "AUPRC", "AUROC", "recall@1%FPR", "recall", "FPR", "ms/prompt"]
    header = [header[0], *(f"{title}  " for title in header[1:])]
    return report.table(header, rows) + f"\n{NOTES}"


def _measures(
    labels: list[int], detector: Detector, scores: Tensor, milliseconds: float
) -> dict[str, float]:
    from gradsafe._cli.report import judge, rank

    assert detector.threshold is not None
    ranking = rank(labels, scores.tolist(), MAX_FPR)
    decisions = judge(labels, (scores > detector.threshold).tolist())
    return {
        "AUPRC": ranking.auprc,
        "AUROC": ranking.auroc,
        "recall@1%FPR": ranking.recall_at_fpr,
        "recall": decisions.recall,
        "FPR": decisions.fpr,
        "ms/prompt": milliseconds,
    }

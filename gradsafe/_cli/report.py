"""Tables of the command line, and the measures of a detector on labelled prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranking:
    """How well scores separate unsafe (1) from safe (0) prompts; needs no threshold.

    Attributes:
        auprc: Area under the precision-recall curve, as average precision.
        auroc: Area under the ROC curve.
        recall_at_fpr: Largest recall of any threshold with at most the given false positive rate.
    """

    auprc: float
    auroc: float
    recall_at_fpr: float


@dataclass(frozen=True)
class Decisions:
    """How well flags agree with labels.

    Attributes:
        recall: Share of the unsafe prompts that are flagged.
        fpr: False positive rate, the share of the safe prompts that are flagged.
        f1: F1 of the unsafe class.
    """

    recall: float
    fpr: float
    f1: float


def rank(labels: Sequence[int], scores: Sequence[float], max_fpr: float = 0.01) -> Ranking:
    """Measures the order that scores put labelled prompts in.

    Args:
        labels: 1 for unsafe, 0 for safe; both must occur.
        scores: Higher means more unsafe.
        max_fpr: False positive rate of `recall_at_fpr`.

    Raises:
        ValueError: Only one label occurs, so there is no order to measure.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    if len(set(labels)) < 2:
        raise ValueError("a ranking needs prompts of both labels, safe and unsafe")
    fpr, recall, _ = roc_curve(labels, scores, drop_intermediate=False)
    return Ranking(
        auprc=float(average_precision_score(labels, scores)),
        auroc=float(roc_auc_score(labels, scores)),
        recall_at_fpr=float(recall[fpr <= max_fpr].max()),
    )


def judge(labels: Sequence[int], flags: Sequence[bool]) -> Decisions:
    """Compares flags with labels; a rate without any prompt to count is NaN."""
    unsafe, flagged = np.asarray(labels, dtype=bool), np.asarray(flags, dtype=bool)
    hits = int((unsafe & flagged).sum())
    return Decisions(
        recall=_ratio(hits, int(unsafe.sum())),
        fpr=_ratio(int((~unsafe & flagged).sum()), int((~unsafe).sum())),
        f1=_ratio(2 * hits, int(unsafe.sum() + flagged.sum())),
    )


def detection_summary(
    method: str,
    scores: Sequence[float],
    labels: Sequence[int] | None,
    flags: Sequence[bool] | None,
) -> str:
    """Sums a run up in one small table: measures with labels, else the spread of the scores.

    Args:
        method: Name of the row.
        scores: One per prompt.
        labels: 1 for unsafe, 0 for safe, if known.
        flags: Prompts above the threshold, if there is one.

    Returns:
        The table, and a note where the threshold or one of the two labels is missing.
    """
    cells = {"method": method, "prompts": str(len(scores))}
    notes = []
    if labels is None:
        low, middle, high = np.quantile(scores, (0.0, 0.5, 1.0))
        cells |= {"min": f"{low:.4g}", "median": f"{middle:.4g}", "max": f"{high:.4g}"}
    else:
        cells["unsafe"] = str(sum(labels))
        if len(set(labels)) == 2:
            ranking = rank(labels, scores)
            cells |= {"AUPRC": decimal(ranking.auprc), "AUROC": decimal(ranking.auroc)}
        else:
            notes.append("AUPRC and AUROC need prompts of both labels")
    if flags is None:
        notes.append("no threshold, so no flags: give --calibrate a file of harmless prompts")
    else:
        cells["flagged"] = str(sum(flags))
        if labels is not None:
            decisions = judge(labels, flags)
            cells |= {"recall": percent(decisions.recall), "FPR": percent(decisions.fpr)}
            cells["F1"] = decimal(decisions.f1)
    return "\n".join([table(list(cells), [list(cells.values())]), *notes])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lays out columns: the first `left` flush left, the others flush right.

    Args:
        header: Column titles.
        rows: Cells, as many per row as there are titles.
        left: How many columns hold text.

    Returns:
        Lines without trailing blanks.
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    laid_out = []
    for line in (header, rule, *rows):
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        laid_out.append("  ".join(cells).rstrip())
    return "\n".join(laid_out)


def percent(value: float) -> str:
    """Formats a share, for example "97.3 %"; NaN as "n/a"."""
    return "n/a" if np.isnan(value) else f"{100 * value:.1f} %"


def decimal(value: float) -> str:
    """Formats a measure with three decimals; NaN as "n/a"."""
    return "n/a" if np.isnan(value) else f"{value:.3f}"


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")

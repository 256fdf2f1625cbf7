"""Quality of scores and flags on labelled prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranking:
    """How well scores separate unsafe (1) from safe (0) prompts, without a threshold."""

    auprc: float  # area under the precision-recall curve, as average precision
    auroc: float
    recall_at_fpr: float  # largest of any threshold with at most this false-positive rate


@dataclass(frozen=True)
class Decisions:
    """How well flags agree with labels."""

    recall: float  # share of the unsafe prompts that are flagged
    fpr: float  # false-positive rate: share of the safe prompts that are flagged
    f1: float  # of the unsafe class


def rank(labels: Sequence[int], scores: Sequence[float], max_fpr: float = 0.01) -> Ranking:
    """Measures how scores rank prompts with labels 1 (unsafe) and 0 (safe); both must occur."""
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
    """Compares flags with labels; a rate without any prompt is NaN."""
    unsafe, flagged = np.asarray(labels, dtype=bool), np.asarray(flags, dtype=bool)
    hits = int((unsafe & flagged).sum())
    return Decisions(
        recall=_ratio(hits, int(unsafe.sum())),
        fpr=_ratio(int((~unsafe & flagged).sum()), int((~unsafe).sum())),
        f1=_ratio(2 * hits, int(unsafe.sum() + flagged.sum())),
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")

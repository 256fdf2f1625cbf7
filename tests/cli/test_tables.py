"""Measures and tables of the command line."""

from __future__ import annotations

import numpy as np
import pytest

from gradsafe._cli.render import tables
from gradsafe.detection import metrics


def test_perfect_and_reversed_rankings() -> None:
    labels = [0, 0, 1, 1]
    assert metrics.rank(labels, [1, 2, 3, 4]) == metrics.Ranking(1.0, 1.0, 1.0)
    reversed_order = metrics.rank(labels, [4, 3, 2, 1])
    assert reversed_order.auroc == 0.0
    assert reversed_order.recall_at_fpr == 0.0


def test_recall_at_fpr_uses_the_best_allowed_threshold() -> None:
    labels = [0] * 100 + [1] * 10
    scores = [*range(100), *([98.5] * 4), *([99.5] * 5), 0.5]
    assert metrics.rank(labels, scores, 0.01).recall_at_fpr == 0.9
    assert metrics.rank(labels, scores, 0.001).recall_at_fpr == 0.5


def test_one_label_cannot_be_ranked() -> None:
    with pytest.raises(ValueError, match="both labels"):
        metrics.rank([1, 1], [0.1, 0.2])


def test_decisions() -> None:
    decisions = metrics.judge([1, 1, 0, 0, 0], [True, False, True, False, False])
    assert decisions == metrics.Decisions(0.5, 1 / 3, 0.5)
    assert np.isnan(metrics.judge([0], [False]).recall)
    assert tables.percent(float("nan")) == "n/a"


def test_tables_align() -> None:
    text = tables.table(["name", "value"], [["a", "1"], ["[b]longer", "10.5"]])
    assert text.splitlines() == [
        "name        value",
        "─────────────────",
        "a               1",
        "[b]longer    10.5",
    ]

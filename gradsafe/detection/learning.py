"""Learning from labels: weights of component values and hidden states, by logistic regression.

Nothing here imports torch: the command line checks labels before it loads a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradsafe._checks import refuse
from gradsafe.detection.config import Features

Array = np.ndarray[Any, np.dtype[Any]]

FOLDS = 5  # of the cross-validation, fewer with fewer labels of a class
STRENGTHS = np.logspace(-4, 2, 7)  # inverse regularisation that it chooses from


@dataclass(frozen=True)
class Learning:
    """What `Detector.learn` found.

    Attributes:
        features: What the score is computed from: "components", "hidden" or "both".
        layer: Index of the decoder block whose hidden state is read, None for "components".
        unsafe: Number of prompts labelled unsafe.
        safe: Number of prompts labelled safe.
        auroc: Cross-validated AUROC on the labelled prompts. The regularisation and the layer were
            chosen on the same folds, so it is a little optimistic.
        before: AUROC of the score without learning on the same prompts.
    """

    features: Features
    layer: int | None
    unsafe: int
    safe: int
    auroc: float
    before: float

    def __post_init__(self) -> None:
        if (self.layer is None) != (self.features == "components") or (self.layer or 0) < 0:
            raise ValueError(f"expected a layer that fits {self.features!r}, got {self.layer}")
        rates = 0 <= self.auroc <= 1 and 0 <= self.before <= 1
        if min(self.unsafe, self.safe) < 2 or not rates:
            raise ValueError("expected two labels of each class and rates between 0 and 1")

    def __str__(self) -> str:
        source = {"components": "components", "hidden": "the hidden state"}
        text = source.get(self.features, "components and the hidden state")
        return (
            f"learned from {self.unsafe} unsafe and {self.safe} safe prompts with {text}"
            f"{'' if self.layer is None else f' of block {self.layer}'}: cross-validated AUROC "
            f"{self.auroc:.3f}, before {self.before:.3f}"
        )


def check_labels(labels: Any, prompts: int, where: str = "Detector.learn") -> Array:
    """The labels as `[n]` int64, 1 for unsafe.

    Raises:
        TypeError: `labels` is no list, array or tensor.
        ValueError: Not one label per prompt, a label that is not 0, 1, False or True, or fewer than
            two labels of a class.
    """
    listed = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Sequence):
        refuse(where, "labels to be a list", type(labels).__name__, kind=TypeError)
    if len(listed) != prompts:
        refuse(where, f"one label for each of the {prompts} prompts", f"{len(listed)} labels")
    for index, label in enumerate(listed):
        if label not in (0, 1):
            refuse(where, f"labels[{index}] to be 1 (unsafe) or 0 (safe)", repr(label))
    found = np.array([int(label) for label in listed])
    unsafe = int(found.sum())
    if min(unsafe, prompts - unsafe) < 2:
        got = f"{unsafe} unsafe and {prompts - unsafe} safe"
        refuse(where, "at least 2 labelled prompts of each class", got)
    return found


def learn_weights(
    components: Array | None, states: Mapping[int, Array], labels: Array
) -> tuple[int | None, float, dict[str, Array]]:
    """Fit a logistic regression (L2, balanced classes) to labels `[n]`.

    Columns are standardised. Each block of features, the components and the hidden state, is also
    divided by the square root of its width, so that both have the same say whatever their number of
    columns. Stratified cross-validation chooses the regularisation by the log loss, and with it one
    of several layers; with fewer than `FOLDS` labels of a class, the last one.

    Args:
        components: Values `[n, C]`, None to leave them out.
        states: Layer to hidden states `[n, H]`; empty to leave them out.
        labels: 1 for unsafe, 0 for safe; at least two of each.

    Returns:
        The layer, the cross-validated AUROC, and float64 weights w of the unscaled features: the
        log-odds are `components @ w["components"] + states @ w["hidden"] + w["bias"].sum()`, where
        `w["bias"][1]` centres the part of the hidden state on the labelled prompts.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict

    count = min(FOLDS, *np.bincount(labels).tolist())
    folds = StratifiedKFold(count, shuffle=True, random_state=0)
    regression = LogisticRegression(class_weight="balanced", max_iter=1000, tol=1e-6)
    search = GridSearchCV(regression, {"C": STRENGTHS}, scoring=_balanced_log_loss, cv=folds)
    found: list[tuple[float, int | None, float, dict[str, Array]]] = []
    tried: list[int | None] = [*states] or [None]
    for layer in tried if count == FOLDS else tried[-1:]:
        blocks = {} if components is None else {"components": components}
        if layer is not None:
            blocks["hidden"] = states[layer]
        means = {name: block.mean(0) for name, block in blocks.items()}
        scales = {name: _scales(block) for name, block in blocks.items()}
        scaled = np.hstack([(blocks[name] - means[name]) * scales[name] for name in blocks])
        chosen = search.fit(scaled, labels).best_estimator_
        held_out = cross_val_predict(chosen, scaled, labels, cv=folds, method="decision_function")
        parts = np.split(chosen.coef_[0], np.cumsum([len(means[name]) for name in blocks])[:-1])
        weights = {n: w * scales[n] for n, w in zip(blocks, parts, strict=True)}
        offsets = {name: -float(means[name] @ weights[name]) for name in blocks}
        constant = float(chosen.intercept_[0]) + offsets.get("components", 0.0)
        weights["bias"] = np.array([constant, offsets.get("hidden", 0.0)])
        auroc = float(roc_auc_score(labels, held_out))
        found.append((_log_loss(labels, held_out), layer, auroc, weights))
    return min(found, key=lambda each: each[0])[1:]


def _scales(block: Array) -> Array:
    """What centred columns are multiplied by; 0 for constant ones."""
    spread = block.std(0) * np.sqrt(block.shape[1])
    return np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)


def _log_loss(labels: Array, log_odds: Array) -> float:
    """Log loss with equal weight for both classes, as in the fit."""
    losses = np.logaddexp(0.0, np.where(labels == 1, -log_odds, log_odds))
    return float(np.mean([losses[labels == label].mean() for label in (0, 1)]))


def _balanced_log_loss(model: Any, features: Array, labels: Array) -> float:
    return -_log_loss(labels, model.decision_function(features))

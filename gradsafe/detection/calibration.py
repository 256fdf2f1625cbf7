"""A threshold from benign data, with what is known about its false-positive rate."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Threshold and its measured false-positive rate; a prompt is flagged if its score is larger.

    Attributes:
        threshold: The threshold.
        max_fpr: The wanted bound on the false-positive rate.
        fpr: Share of the calibration prompts above the threshold.
        fpr_interval: Exact (Clopper-Pearson) 95 % interval of the false-positive rate on prompts
            like the calibration prompts.
        n: Number of calibration prompts.
    """

    threshold: float
    max_fpr: float
    fpr: float
    fpr_interval: tuple[float, float]
    n: int

    def __str__(self) -> str:
        low, high = self.fpr_interval
        return (
            f"threshold {self.threshold:.6g}: {100 * self.fpr:.2f} % of {self.n} benign prompts "
            f"flagged (95 % interval {100 * low:.2f} to {100 * high:.2f} %)"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Calibration:
        """Restore from `to_json`."""
        return cls(**{**values, "fpr_interval": tuple(values["fpr_interval"])})


def calibrate(scores: Tensor, max_fpr: float) -> Calibration:
    """Choose the smallest threshold that keeps the false-positive rate at or below `max_fpr`.

    The threshold is the ceil((n + 1)(1 - max_fpr))-th smallest score (split conformal prediction):
    for new prompts of the same kind the chance of a false alarm is at most `max_fpr`, on average
    over calibration sets. With fewer than 1 / max_fpr - 1 prompts that cannot be promised; the
    largest score is taken then, with a warning.

    Args:
        scores: `[n]` scores of benign prompts.
        max_fpr: Between 0 and 1, both excluded.

    Returns:
        The calibration.

    Raises:
        ValueError: No scores, a score that is no number, or `max_fpr` out of range.
    """
    if not 0 < max_fpr < 1:
        raise ValueError(f"gradsafe.calibrate: expected 0 < max_fpr < 1, got {max_fpr}")
    n = scores.numel()
    if n == 0:
        raise ValueError("gradsafe.calibrate: expected benign prompts, got none")
    if torch.isnan(scores).any():
        raise ValueError("gradsafe.calibrate: a score is NaN")
    ordered = scores.double().sort().values
    # The small term keeps an exact product such as 100 * 0.99 from being pushed up by rounding.
    rank = math.ceil((n + 1) * (1 - max_fpr) - 1e-9)
    if rank > n:
        warnings.warn(
            f"gradsafe.calibrate: {n} benign prompts are too few to promise a false-positive rate "
            f"of {max_fpr} (at least {math.ceil(1 / max_fpr) - 1} are needed); the threshold is "
            "their largest score",
            stacklevel=2,
        )
        rank = n
    threshold = float(ordered[rank - 1])
    alarms = int((ordered > threshold).sum())
    return Calibration(threshold, max_fpr, alarms / n, exact_interval(alarms, n), n)


def exact_interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate from `hits` of `n`."""
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high

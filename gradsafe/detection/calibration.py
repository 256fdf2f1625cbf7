"""Thresholds from prompts: for the scores, and for the NLL values that the cascade decides by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.stats import beta
from torch import Tensor

from gradsafe._checks import refuse

LEVELS = 100  # the saved quantiles of the scores are its percentiles, with both ends
BINS = 10  # of equal share, between which the stability index compares distributions
FLOAT32_MAX = torch.finfo(torch.float32).max
LEAST_SHARE = 1e-4  # of a bin, so that an empty one does not make the index infinite


@dataclass(frozen=True)
class Calibration:
    """Threshold and its measured false-positive rate; prompts with a higher score are flagged.

    Attributes:
        threshold: The threshold.
        max_fpr: The requested bound on the false-positive rate.
        fpr: Share of the calibration prompts above the threshold.
        fpr_interval: Exact (Clopper-Pearson) 95 % confidence interval of the false-positive rate on
            prompts like the calibration prompts.
        n: Number of calibration prompts.
        quantiles: Percentiles 0 to 100 of their scores, to compare later scores with; none if it
            was saved before they were recorded.
        facts: What the scores belong to, see `calibration_facts`; None if it was not recorded.
    """

    threshold: float
    max_fpr: float
    fpr: float
    fpr_interval: tuple[float, float]
    n: int
    quantiles: tuple[float, ...] = ()
    facts: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        rates = (self.fpr, *self.fpr_interval)
        if not math.isfinite(self.threshold):
            raise ValueError(f"expected a finite threshold, got {self.threshold}")
        if not (0 < self.max_fpr < 1 and all(0 <= rate <= 1 for rate in rates) and self.n >= 1):
            raise ValueError("expected rates between 0 and 1, of at least one prompt")
        ordered = list(self.quantiles) == sorted(self.quantiles)
        if len(self.quantiles) not in (0, LEVELS + 1) or not ordered:
            raise ValueError(f"expected {LEVELS + 1} ascending quantiles, or none")

    def __str__(self) -> str:
        low, high = self.fpr_interval
        return (
            f"threshold {self.threshold:.6g}: {100 * self.fpr:.2f} % of {self.n} benign prompts "
            f"flagged (95 % interval {100 * low:.2f} to {100 * high:.2f} %)"
        )

    def drift(self, scores: Tensor) -> float:
        """Population stability index of later scores `[n]` against those of the calibration.

        The sum over ten bins of equal share in the calibration of (a - e) ln(a / e), with a the
        share of the later scores and e that of the calibration. By convention below 0.1 is no
        change and above 0.25 a large one. NaN scores count as the highest.

        Raises:
            ValueError: No scores, or the calibration holds no quantiles.
        """
        if not self.quantiles or scores.numel() == 0:
            refuse("Calibration.drift", "scores, and a calibration with quantiles", "none")
        grid = torch.tensor(self.quantiles, dtype=torch.float64)
        edges = grid[:: LEVELS // BINS][1:-1].unique()
        below = (torch.searchsorted(grid, edges, right=True) - 1) / LEVELS
        found = scores.double().nan_to_num(math.inf, math.inf, -math.inf).sort().values
        actual = torch.searchsorted(found, edges, right=True) / len(found)
        ends = torch.zeros(1), torch.ones(1)
        a, e = (
            torch.cat([ends[0], share, ends[1]]).diff().clamp(min=LEAST_SHARE)
            for share in (actual, below)
        )
        return float(((a - e) * (a / e).log()).sum())


def calibrate(scores: Tensor, max_fpr: float) -> Calibration:
    """Choose the smallest threshold for the scores `[n]` of benign prompts.

    It is the ceil((n + 1)(1 - max_fpr))-th smallest score (split conformal prediction): for new
    prompts of the same distribution the probability of a false alarm is at most `max_fpr`, on
    average over calibration sets. With too few prompts it is the largest score, with a warning.
    """
    if not 0 < max_fpr < 1:
        refuse("calibrate", "0 < max_fpr < 1", max_fpr)
    n = scores.numel()
    if n == 0:
        refuse("calibrate", "benign prompts", "none")
    if torch.isnan(scores).any():
        raise ValueError("gradsafe.calibrate: a score is NaN")
    ordered = scores.double().sort().values
    # The small term keeps an exact product such as 100 * 0.99 from being rounded up.
    rank = max(1, math.ceil((n + 1) * (1 - max_fpr) - 1e-9))
    if rank > n:
        warnings.warn(
            f"gradsafe.calibrate: {n} benign prompts are too few to guarantee a false-positive "
            f"rate of {max_fpr} (at least {math.ceil(1 / max_fpr) - 1} are needed); the threshold "
            "is their largest score",
            stacklevel=2,
        )
        rank = n
    threshold = float(ordered[rank - 1])
    alarms = int((ordered > threshold).sum())
    interval = exact_interval(alarms, n)
    places = (torch.linspace(0, 1, LEVELS + 1) * (n - 1)).round().long()
    finite = ordered[places].clamp(-FLOAT32_MAX, FLOAT32_MAX)  # JSON has no infinity
    return Calibration(threshold, max_fpr, alarms / n, interval, n, tuple(finite.tolist()))


def exact_interval(hits: int, n: int) -> tuple[float, float]:
    """Clopper-Pearson interval of 95 % of a rate from `hits` of `n`."""
    tail = 0.025
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


@dataclass(frozen=True)
class Band:
    """The NLL values, in nats, between which the forward pass is not decisive.

    A prompt with an NLL of the response below `low` is cleared, above `high` scored as unsafe.
    """

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        return (
            f"NLL below {self.low:.4g} clears a prompt, NLL above {self.high:.4g} marks it as "
            "unsafe, gradients decide between them"
        )

    def unsure(self, nll: Tensor) -> Tensor:
        """Which prompts need gradients, `[n]` bool; those with a NaN loss do."""
        return ~((nll < self.low) | (nll > self.high))

    def sure_scores(self, nll: Tensor) -> Tensor:
        """Scores of the others: below 0 if cleared, above 1 if unsafe, in the order of the NLL."""
        return torch.where(nll < self.low, nll - self.low, 1 + (nll - self.high))


def choose_band(benign: Tensor, unsafe: Tensor, *, max_fpr: float, max_fnr: float) -> Band:
    """Choose the NLL values beyond which the forward pass decides alone, from those of prompts.

    Both ends are split-conformal quantiles: of new prompts of the same distributions, at most
    `max_fnr` of the unsafe ones are cleared by their NLL alone, and at most `max_fpr` of the benign
    ones are marked as unsafe by it, on average over calibration sets. Where the NLL separates the
    two classes, the band lies between them. Too few unsafe prompts leave the lower end open, with a
    warning.
    """
    if not 0 < max_fnr < 1:
        refuse("choose_band", "0 < max_fnr < 1", max_fnr)
    if unsafe.numel() == 0:
        refuse("choose_band", "unsafe prompts", "none")
    if torch.isnan(unsafe).any():
        raise ValueError("gradsafe.choose_band: the loss of an unsafe prompt is NaN")
    upper = calibrate(benign, max_fpr).threshold
    rank = math.floor((unsafe.numel() + 1) * max_fnr + 1e-9)
    if rank == 0:
        warnings.warn(
            f"gradsafe.choose_band: {unsafe.numel()} unsafe prompts are too few to guarantee that "
            f"at most {max_fnr} of them are cleared (at least {math.ceil(1 / max_fnr) - 1} are "
            "needed); no prompt will be cleared without gradients",
            stacklevel=2,
        )
        return Band(high=upper)
    lower = float(unsafe.double().sort().values[rank - 1])
    return Band(min(lower, upper), max(lower, upper))

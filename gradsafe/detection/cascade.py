"""A cheap score where it is sure, gradients elsewhere: two thresholds on the response's loss."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gradsafe.detection.calibration import calibrate


@dataclass(frozen=True)
class Band:
    """Losses between which the forward pass is not sure, in nats.

    Attributes:
        low: A prompt whose response has a smaller NLL is cleared without gradients.
        high: A prompt whose response has a larger NLL counts as unsafe without gradients.
    """

    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"NLL below {self.low:.4g} clears a prompt, above {self.high:.4g} it counts as unsafe, "
            "between them gradients decide"
        )

    def unsure(self, nll: Tensor) -> Tensor:
        """Which prompts need gradients, `[n]` bool; a loss that is no number does."""
        return ~((nll < self.low) | (nll > self.high))

    def sure_scores(self, nll: Tensor) -> Tensor:
        """Scores of the others: below 0 if cleared, above 1 if unsafe, in the order of the loss."""
        return torch.where(nll < self.low, nll - self.low, 1 + (nll - self.high))

    def to_json(self) -> dict[str, Any]:
        """Strict JSON has no infinity: None stands for it."""
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Band:
        """Restore from `to_json`."""
        low, high = values["low"], values["high"]
        return cls(-math.inf if low is None else low, math.inf if high is None else high)


def choose_band(benign: Tensor, unsafe: Tensor, max_fpr: float, max_fnr: float) -> Band:
    """Choose the losses beyond which a forward pass decides.

    Both ends are split-conformal quantiles: of new prompts of the same kinds, at most `max_fnr` of
    the unsafe ones are cleared by their loss alone, and at most `max_fpr` of the harmless ones are
    called unsafe by it, on average over calibration sets.

    Args:
        benign: `[n]` NLL of the response after harmless prompts.
        unsafe: `[m]` NLL after unsafe prompts.
        max_fpr: Between 0 and 1, both excluded.
        max_fnr: Between 0 and 1, both excluded.

    Returns:
        The band. Where the loss separates the two kinds, it lies between them.

    Raises:
        ValueError: A set is empty or holds NaN, or a bound is out of range.

    Warns:
        UserWarning: Too few prompts for one of the promises; too few unsafe ones clear nothing.
    """
    if not 0 < max_fnr < 1:
        raise ValueError(f"gradsafe.choose_band: expected 0 < max_fnr < 1, got {max_fnr}")
    if unsafe.numel() == 0:
        raise ValueError("gradsafe.choose_band: expected unsafe prompts, got none")
    if torch.isnan(unsafe).any():
        raise ValueError("gradsafe.choose_band: the loss of an unsafe prompt is NaN")
    upper = calibrate(benign, max_fpr).threshold
    rank = math.floor((unsafe.numel() + 1) * max_fnr + 1e-9)
    if rank == 0:
        warnings.warn(
            f"gradsafe.choose_band: {unsafe.numel()} unsafe prompts are too few to promise that "
            f"{max_fnr} of them are cleared (at least {math.ceil(1 / max_fnr) - 1} are needed); no "
            "prompt will be cleared without gradients",
            stacklevel=2,
        )
        return Band(-math.inf, upper)
    lower = float(unsafe.double().sort().values[rank - 1])
    return Band(min(lower, upper), max(lower, upper))

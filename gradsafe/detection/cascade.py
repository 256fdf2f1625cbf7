"""The cascade: two thresholds on the NLL of the response, between which gradients decide."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.detection.calibration import calibrate


@dataclass(frozen=True)
class Band:
    """The NLL values, in nats, between which the forward pass is not decisive.

    Attributes:
        low: A prompt with a smaller NLL of the response is cleared without gradients.
        high: A prompt with a larger NLL is scored as unsafe without gradients.
    """

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        return (
            f"an NLL below {self.low:.4g} clears a prompt, one above {self.high:.4g} marks it as "
            "unsafe, gradients decide between them"
        )

    def unsure(self, nll: Tensor) -> Tensor:
        """Which prompts need gradients, `[n]` bool; those with a NaN loss do."""
        return ~((nll < self.low) | (nll > self.high))

    def sure_scores(self, nll: Tensor) -> Tensor:
        """Scores of the others: below 0 if cleared, above 1 if unsafe, in the order of the NLL."""
        return torch.where(nll < self.low, nll - self.low, 1 + (nll - self.high))


def choose_band(benign: Tensor, unsafe: Tensor, max_fpr: float, max_fnr: float) -> Band:
    """Choose the NLL values beyond which the forward pass decides alone.

    Both ends are split-conformal quantiles: of new prompts of the same distributions, at most
    `max_fnr` of the unsafe ones are cleared by their NLL alone, and at most `max_fpr` of the benign
    ones are marked as unsafe by it, on average over calibration sets. Where the NLL separates the
    two classes, the band lies between them. With too few unsafe prompts for the bound, nothing is
    cleared without gradients, and a warning says so. `benign` and `unsafe` are the NLL of the
    response after such prompts, `[n]` and `[m]`.
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
            f"gradsafe.choose_band: {unsafe.numel()} unsafe prompts are too few to guarantee that "
            f"at most {max_fnr} of them are cleared (at least {math.ceil(1 / max_fnr) - 1} are "
            "needed); no prompt will be cleared without gradients",
            stacklevel=2,
        )
        return Band(high=upper)
    lower = float(unsafe.double().sort().values[rank - 1])
    return Band(min(lower, upper), max(lower, upper))

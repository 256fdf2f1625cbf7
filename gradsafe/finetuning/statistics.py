"""Statistics of gradient surgery, collected on the device and read only on request."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_FOLDED_AT = 256  # so many results are kept before they are added to the running sums


@dataclass(frozen=True)
class SurgeryStatistics:
    """Statistics since the last reset; means are over the merged steps.

    Attributes:
        steps: Number of merged steps.
        skipped: Number of steps with a non-finite gradient.
        cosine: Mean cosine of user and alignment gradient before the merge (0 if one is zero).
        conflict_rate: Fraction of the conflict tests with a negative dot product.
        user_norm: Mean norm of the user gradient.
        align_norm: Mean norm of the alignment gradient.
        coefficient: Mean factor of the alignment gradient in the merged gradient.
    """

    steps: int
    skipped: int
    cosine: float
    conflict_rate: float
    user_norm: float
    align_norm: float
    coefficient: float


class RunningStatistics:
    """Sums over the results of many merges. Adding a result launches no kernel."""

    def __init__(self) -> None:
        self._recent: list[Tensor] = []
        self._totals: Tensor | None = None
        self._skipped_before = 0

    def add(self, results: Tensor) -> None:
        """Adds the results `[G, 4]` of one merge."""
        self._recent.append(results)
        if len(self._recent) >= _FOLDED_AT:
            self._fold()

    @property
    def skipped(self) -> int:
        """Number of non-finite steps since construction."""
        return self._skipped_before + self.read().skipped

    def read(self) -> SurgeryStatistics:
        """Return the statistics; synchronises with the device."""
        self._fold()
        values = [0.0] * 7 if self._totals is None else self._totals.tolist()
        steps, skipped, *sums = values
        means = [value / steps if steps else math.nan for value in sums]
        return SurgeryStatistics(int(steps), int(skipped), *means)

    def reset(self) -> None:
        """Resets everything except `skipped`."""
        self._skipped_before = self.skipped
        self._totals = None

    @torch.no_grad()
    def _fold(self) -> None:
        by_tests: dict[int, list[Tensor]] = {}
        for results in self._recent:
            by_tests.setdefault(len(results), []).append(results)
        self._recent = []
        for alike in by_tests.values():
            added = _totals(torch.stack(alike))
            self._totals = added if self._totals is None else self._totals + added


def _totals(results: Tensor) -> Tensor:
    """Sums the fields of the statistics over steps: `[steps, G, 4]` to `[7]`."""
    finite = results[..., 3].isfinite().all(1)
    dot, sq_user, sq_align = results[..., :3].sum(1).unbind(1)
    product = (sq_user * sq_align).sqrt()
    per_step = [
        torch.where(product > 0, dot / product, 0.0),
        (results[..., 0] < 0).double().mean(1),
        sq_user.sqrt(),
        sq_align.sqrt(),
        results[..., 3].mean(1),
    ]
    merged = [torch.where(finite, value, 0.0).sum() for value in per_step]
    return torch.stack([finite.double().sum(), (~finite).double().sum(), *merged])

"""The result of scoring prompts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of n prompts, in input order; a higher score means more likely unsafe.

    Attributes:
        values: `[n]` float32.
        components: `[n, C]` float32, what `values` was reduced from; `Detector.components` names
            the columns. `[n, 0]` where they were not asked for, or do not exist (NLL).
        nll: `[n]` float32, mean NLL of the compliance response after each prompt (natural log).
        backward: `[n]` bool, whether gradients were computed for the prompt. Method "cascade" does
            without where the loss is sure; components of such prompts are NaN.
        threshold: The detector's calibrated threshold, None if it was not calibrated.
    """

    values: Tensor
    components: Tensor
    nll: Tensor
    backward: Tensor
    threshold: float | None

    def __len__(self) -> int:
        return len(self.values)

"""The simplest probe: the direction from safe to unsafe references in a layer's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsafe import DetectorConfig
from gradsafe.detection.gradients import GradientPass
from gradsafe.models import find_layers


class MeanDifference:
    """Scores prompts by their projection on the difference of the references' means."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        unsafe: Sequence[str],
        safe: Sequence[str],
        block: int | None = None,
    ) -> None:
        layers, config = find_layers(model), DetectorConfig(method="nll")
        self.passes = GradientPass(model, tokenizer, config, layers, {}, 4096, False)
        self.block = 2 * len(layers.blocks) // 3 if block is None else block
        unsafe_mean, safe_mean = (self.states(prompts).mean(0) for prompts in (unsafe, safe))
        self.direction = unsafe_mean - safe_mean

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Scores `[n]`."""
        return self.states(prompts) @ self.direction

    def states(self, prompts: Sequence[str]) -> Tensor:
        """Output `[n, d]` float32 of the block at the last prompt token of every prompt."""
        items = self.passes.encode(prompts, "prompts").items
        found: list[Tensor] = [torch.empty(0)] * len(items)
        for indices, _, states in self.passes.run(items, None, "", [self.block]):
            for place, state in zip(indices, states, strict=True):
                found[place] = state
        return torch.stack(found)

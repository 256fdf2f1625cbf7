"""From encoded prompts to scores: the common part of all score methods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import ClassVar

import torch
from torch import Tensor

from gradsafe.detection.components import DOTS, ComponentMap
from gradsafe.detection.config import Granularity
from gradsafe.detection.factors import Factors
from gradsafe.detection.gradients import EncodedPrompts, GradientPass, NonFiniteGradientError
from gradsafe.detection.references import prepare_function
from gradsafe.detection.state import DetectorState
from gradsafe.models import Layers, LinearLayer

Groups = Mapping[str, EncodedPrompts]  # "unsafe" and "safe" ones, or empty
# The state with what a method learned, and the NLL values of each group.
Learned = tuple[DetectorState, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Scores:
    """Scores of n prompts, in input order; a higher score means more likely unsafe.

    Attributes:
        values: `[n]` float32.
        components: `[n, C]` float32, the component values that `values` was reduced from;
            `Detector.components` names the columns. `[n, 0]` where they were not requested or do
            not exist (method "nll").
        nll: `[n]` float32, mean negative log-likelihood (NLL) of the compliance response after each
            prompt, in nats.
        backward: `[n]` bool, whether gradients were computed for the prompt. Method "cascade"
            computes none where the NLL is decisive; the components of such prompts are NaN.
        threshold: The detector's calibrated threshold, None if it was not calibrated.
        control_tokens: `[n]` int64, number of special tokens of the tokenizer that the prompt's own
            text writes, not the template. More than 0 is a sign of prompt injection.
    """

    values: Tensor
    components: Tensor
    nll: Tensor
    backward: Tensor
    threshold: float | None = None
    control_tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.values)


class Method:
    """A fitted score method. A subclass defines `__call__`, and `fit` if it learns anything."""

    granularity: ClassVar[Granularity | None] = None  # None for the option of that name
    unsigned: bool = False  # whether dots are computed from abs(g)
    blocks: Sequence[int] = ()  # decoder blocks whose hidden states it reads

    def __init__(self, state: DetectorState, layers: Layers) -> None:
        self.state = state
        self.config = state.config
        self.components = self.component_map(state, layers)
        self.selected = state.learned.get("selected")  # [C] bool; None for all components

    @classmethod
    def component_map(cls, state: DetectorState, layers: Layers) -> ComponentMap:
        """The components of the scored layers."""
        granularity = cls.granularity or state.config.granularity
        return ComponentMap(layers, granularity, state.output_projections, state.rows)

    @classmethod
    def fit(cls, state: DetectorState, gradients: GradientPass, groups: Groups) -> Learned:
        """Learn from the "unsafe" and "safe" prompts; methods without references get none."""
        return state, {}

    def references(self, layer: LinearLayer) -> list[Tensor]:
        """The layer's K references, each `[O, I]`, or `[E, O, I]` for a stack of experts."""
        return [r.weights[layer.name] for r in self.state.references.values()]

    def scales(self, layer: LinearLayer) -> list[float]:
        """K factors that undo the storage scale of the references."""
        return [r.scales[layer.name] for r in self.state.references.values()]

    def moments(self, layer: LinearLayer, factors: Factors) -> Tensor:
        """Sums `[B, slices, 3 + K]` over the slices of one layer's gradients, float64."""
        axis, prepare = self.components[layer][0], prepare_function(self.config)
        return factors.moments(self.references(layer), axis, self.unsigned, prepare)

    def __call__(self, table: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From sums `[B, C, 3 + K]` to scores `[B]` and component values `[B, C]`, all float64.

        `states` are hidden states `[B, blocks * H]`, for methods that read them.
        """
        raise NotImplementedError

    def evidence(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """How the dots of one prompt add up to its score, all denominators fixed; see `explain`.

        From sums `[C, 3 + K]` to factors `[C, K]`, whose products with the dots sum to a
        component's evidence, and the weights `[C]` of the components in the total; float64.
        """
        raise NotImplementedError

    def hidden_evidence(self, states: Tensor) -> Tensor:
        """The part `[B]` float64 of hidden states `[B, blocks * H]` in the scores."""
        return torch.zeros(len(states), dtype=torch.float64)

    @property
    def names(self) -> list[str]:
        """Names of the component values, in column order."""
        names = self.components.names
        return names if self.selected is None else list(compress(names, self.selected.tolist()))

    def score(self, gradients: GradientPass, prompts: EncodedPrompts, keep: bool = True) -> Scores:
        """Score every window; `keep` its component values."""
        count = len(prompts.items)
        nll, values = torch.empty(2, count, dtype=torch.float32)
        components = torch.empty(count, len(self.names) if keep else 0, dtype=torch.float32)
        for indices, batch_nll, table, states in self.tables(gradients, prompts):
            batch_values, parts = self(table, states)
            nll[indices], values[indices] = batch_nll, batch_values.float()
            if keep:
                components[indices] = parts.float()
        return Scores(values, components, nll, torch.ones(count, dtype=torch.bool))

    def tables(
        self, gradients: GradientPass, prompts: EncodedPrompts
    ) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Per batch the indices of its windows, their NLL, sums `[B, C, 3 + K]` and states."""
        names = [prompts.names[owner] for owner in prompts.owners]
        reached: list[tuple[LinearLayer, Tensor]] = []

        def visit(layer: LinearLayer, factors: Factors) -> None:
            reached.append((layer, self.moments(layer, factors)))

        for indices, nll, states in gradients.run(prompts.items, visit, "score", self.blocks):
            columns = DOTS + len(self.state.references)
            table = torch.zeros(len(indices), self.components.size, columns, dtype=torch.float64)
            for layer, device_values in reached:
                values = device_values.cpu()  # waits for the device here, not in every layer
                for k, scale in enumerate(self.scales(layer)):
                    values[..., DOTS + k] *= scale
                _check_finite(gradients.owner, layer, [names[i] for i in indices], values)
                table.index_add_(1, self.components[layer][1], values)
            reached.clear()
            yield indices, nll, table, states


def _check_finite(owner: str, layer: LinearLayer, names: list[str], values: Tensor) -> None:
    bad = (~torch.isfinite(values)).flatten(1).any(1)
    if bad.any():
        raise NonFiniteGradientError(
            f"gradsafe.{owner}: the gradient of {layer.name} holds NaN or Inf for "
            f"{names[int(bad.nonzero()[0])]}; check the model's weights, or run it in bfloat16 or "
            "float32 if it is in float16"
        )


def worst_windows(values: Tensor, owners: Sequence[int], prompts: int) -> Tensor:
    """Index of each prompt's highest-scoring window; NaN is above every number."""
    worst = [-1] * prompts
    keys = [(math.isnan(value), value) for value in values.tolist()]
    for item, owner in enumerate(owners):
        if worst[owner] < 0 or keys[item] > keys[worst[owner]]:
            worst[owner] = item
    return torch.tensor(worst)

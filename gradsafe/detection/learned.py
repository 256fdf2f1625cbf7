"""GradCoo with learned weights, and what it learns from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.detection.config import Features
from gradsafe.detection.gradients import EncodedPrompts, GradientPass
from gradsafe.detection.learning import Array, Learning, learn_weights
from gradsafe.detection.methods import METHODS, GradCoo
from gradsafe.detection.metrics import rank
from gradsafe.detection.scoring import Method, Scores, worst_windows
from gradsafe.detection.state import DetectorState
from gradsafe.models import Layers

DEPTHS = (1 / 3, 1 / 2, 2 / 3)  # of the blocks whose hidden states are tried


class LearnedGradCoo(GradCoo):
    """Log-odds of unsafe, linear in GradCoo's component values and in a hidden state."""

    def __init__(self, state: DetectorState, layers: Layers) -> None:
        super().__init__(state, layers)
        assert state.learning is not None
        self.blocks = () if state.learning.layer is None else (state.learning.layer,)
        self.weights = state.learned.get("components")  # [C] float64
        self.constant, self.offset = state.learned["bias"].tolist()

    def __call__(self, table: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The log-odds, and the component values as without learning."""
        values = super().__call__(table)[1]
        assert states is not None
        log_odds = self.constant + self.hidden_evidence(states)
        return log_odds if self.weights is None else log_odds + values @ self.weights, values

    def hidden_evidence(self, states: Tensor) -> Tensor:
        """The part of the hidden states, centred on the labelled prompts."""
        if not self.blocks:
            return super().hidden_evidence(states)
        return states.double() @ self.state.learned["hidden"] + self.offset

    def evidence(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """As GradCoo's, times the learned weights, so that components sum to the total."""
        factors, _ = super().evidence(table)
        assert self.weights is not None  # `check_explainable`
        weights = self.weights
        if self.config.relative == "share" and self.config.unsigned:
            weights = weights / 2  # the value of a component is (1 + its evidence) / 2
        return factors * weights[:, None], torch.ones_like(weights)

    def score(self, gradients: GradientPass, prompts: EncodedPrompts, keep: bool = True) -> Scores:
        """Without weights for components, and unless they are kept, a forward pass is enough."""
        if keep or self.weights is not None:
            return super().score(gradients, prompts, keep)
        nll, values = torch.empty(2, len(prompts.items), dtype=torch.float32)
        for indices, batch_nll, states in gradients.run(prompts.items, None, "score", self.blocks):
            nll[indices] = batch_nll
            values[indices] = (self.constant + self.hidden_evidence(states)).float()
        return Scores(values, values.new_empty(len(nll), 0), nll, torch.zeros_like(nll).bool())


def make_method(state: DetectorState, layers: Layers) -> Method:
    """The score method of a state."""
    kind = METHODS[state.config.method] if state.learning is None else LearnedGradCoo
    return kind(state, layers)


def learn(
    state: DetectorState,
    gradients: GradientPass,
    prompts: EncodedPrompts,
    labels: Array,
    features: Features,
    layer: int | None,
) -> DetectorState:
    """See `Detector.learn`; `labels` are from `check_labels`."""
    state = replace(state, learning=None, learned={}, calibration=None)
    method, depth = GradCoo(state, gradients.layers), len(gradients.layers.blocks)
    if features != "components":
        method.blocks = candidate_blocks(depth) if layer is None else (layer % depth,)
    batches = [
        (torch.tensor(indices), *method(table), states.double())
        for indices, _, table, states in method.tables(gradients, prompts)
    ]
    order, *columns = (torch.cat(column) for column in zip(*batches, strict=True))
    values, components, states = (column[order.argsort()] for column in columns)
    worst = worst_windows(values, prompts.owners, len(prompts))
    values, components, states = values[worst], components[worst], states[worst]
    for what, found in (("component values", components), ("hidden states", states)):
        if len(bad := (~torch.isfinite(found)).any(1).nonzero()):
            where = prompts.names[int(bad[0])]
            refuse("Detector.learn", f"finite {what}", f"NaN or Inf for {where}")
    parts = zip(method.blocks, states.chunk(max(1, len(method.blocks)), dim=1), strict=False)
    by_layer = {block: part.numpy() for block, part in parts}
    used = None if features == "hidden" else components.numpy()
    chosen, auroc, weights = learn_weights(used, by_layer, labels)
    unsafe, before = int(labels.sum()), rank(labels.tolist(), values.tolist()).auroc
    learning = Learning(features, chosen, unsafe, len(labels) - unsafe, auroc, before)
    learned = {name: torch.from_numpy(found) for name, found in weights.items()}
    return replace(state, learning=learning, learned=learned)


def candidate_blocks(depth: int) -> tuple[int, ...]:
    """Blocks at a third, half and two thirds of the depth, the deepest last."""
    return tuple(sorted({max(0, round(depth * share) - 1) for share in DEPTHS}))

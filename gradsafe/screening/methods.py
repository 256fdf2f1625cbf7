"""The two scores of a row, from the sums of one backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gradsafe.detection.components import COUNT, DOTS, SUM_SQ
from gradsafe.detection.factors import Factors
from gradsafe.detection.methods import GradCoo
from gradsafe.detection.references import Reference
from gradsafe.detection.scoring import Method
from gradsafe.detection.state import DetectorState
from gradsafe.models import Layers, LinearLayer
from gradsafe.screening.config import Measure, ScoreName


class Alignment(Method):
    """How much one step on a row would raise the loss on the alignment rows.

    With g, the gradient of the row's loss, and a, that of the mean loss of the alignment rows, one
    SGD step changes the latter by -eta <g, a> to first order. The score is -<g, a>, or -cos(g, a),
    over all scored weights: higher is more harmful. The form is that of influence functions without
    a Hessian (TracIn, arXiv 2002.08484), with a safety loss as in GradShield (arXiv 2605.14194).
    """

    unsigned = False

    def __init__(self, state: DetectorState, layers: Layers, measure: Measure) -> None:
        super().__init__(state, layers)
        self.measure = measure
        self.norm = float(state.references["alignment"].sums[:, SUM_SQ].sum().sqrt())

    def __call__(self, table: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The score and its part in every weight, which sum to it."""
        parts = table[..., DOTS] * self._factor(table)[..., None]
        return parts.sum(-1), parts

    def evidence(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """The same factor for all weights."""
        factor = self._factor(table).expand(len(table))
        return factor[:, None], torch.ones_like(factor)

    def _factor(self, table: Tensor) -> Tensor:
        """What the dot product is multiplied with, `[...]` for sums `[..., C, 3 + K]`."""
        if self.measure == "dot":
            return table.new_full(table.shape[:-2], -1.0)
        norms = table[..., SUM_SQ].sum(-1).sqrt() * self.norm
        return torch.where(norms > 0, -1 / norms, 0.0)


class Both(Method):
    """The scores that exist, computed in one pass."""

    def __init__(self, parts: Mapping[ScoreName, Method], layers: Layers) -> None:
        self.parts = parts
        references = {k: r for part in parts.values() for k, r in part.state.references.items()}
        state = next(iter(parts.values())).state
        super().__init__(replace(state, references=references), layers)

    def moments(self, layer: LinearLayer, factors: Factors) -> Tensor:
        """The sums of all parts: counts and squares, then the dots of each part in turn.

        The gradient is made once for all unsigned and once for all signed references.
        """
        axis, dots = self.components[layer][0], dict[str, Tensor]()
        for unsigned in (True, False):
            own = {n: p.references(layer) for n, p in self.parts.items() if p.unsigned is unsigned}
            if own:
                sums = factors.moments([r for refs in own.values() for r in refs], axis, unsigned)
                sizes = [len(refs) for refs in own.values()]
                dots |= zip(own, sums[..., DOTS:].split(sizes, -1), strict=True)
        return torch.cat([sums[..., :DOTS], *(dots[name] for name in self.parts)], dim=-1)

    def scores(self, table: Tensor) -> dict[ScoreName, Tensor]:
        """From sums `[B, C, 3 + K]` to scores `[B]` float64."""
        found: dict[ScoreName, Tensor] = {}
        begin = DOTS
        for name, part in self.parts.items():
            end = begin + len(part.state.references)
            own = torch.cat([table[..., COUNT:DOTS], table[..., begin:end]], dim=-1)
            found[name], begin = part(own)[0], end
        return found


def make_method(
    state: DetectorState, references: Mapping[str, Reference], layers: Layers, measure: Measure
) -> Both:
    """The method for what references there are: "unsafe" and "safe", "alignment", or all."""
    parts: dict[ScoreName, Method] = {}

    def using(*names: str) -> DetectorState:
        return replace(state, references={name: references[name] for name in names})

    if "alignment" in references:
        parts["alignment"] = Alignment(using("alignment"), layers, measure)
    if "unsafe" in references:
        parts["share"] = GradCoo(using("unsafe", "safe"), layers)
    return Both(parts, layers)

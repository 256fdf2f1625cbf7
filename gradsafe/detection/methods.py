"""The score methods, one class each. A new one needs its name in `config.Method` too."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gradsafe.detection.components import COUNT, DOTS, SUM_SQ, standard_deviation
from gradsafe.detection.gradients import GradientPass
from gradsafe.detection.references import build_reference
from gradsafe.detection.scoring import Group, Groups, Learned, Method, Scores
from gradsafe.detection.state import DetectorState
from gradsafe.models import Layers


class GradCoo(Method):
    """Unsigned co-occurrence with an unsafe and a safe reference (arXiv 2502.12411).

    With n(g) = abs(g) / std(g): a_c = <n(g_c), n(unsafe_c)>, b_c the same with the safe reference;
    the score is the mean over components of a relative value such as a_c / (a_c + b_c).
    """

    def __init__(self, state: DetectorState, layers: Layers) -> None:
        super().__init__(state, layers)
        self.unsigned = self.config.unsigned
        self.unsafe, self.safe = (state.references[name] for name in ("unsafe", "safe"))

    @classmethod
    def fit(cls, state: DetectorState, gradients: GradientPass, groups: Groups) -> Learned:
        """Build both references."""
        components = cls.component_map(state, gradients.layers)
        found = {
            name: build_reference(gradients, items, components, state.config, f"{name} references")
            for name, (items, _) in groups.items()
        }
        references = {name: reference for name, (reference, _) in found.items()}
        return replace(state, references=references), {
            name: nll for name, (_, nll) in found.items()
        }

    def __call__(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Relative values and their mean, weighted mean or median."""
        a = _divide(table[..., DOTS], self.unsafe.std)
        b = _divide(table[..., DOTS + 1], self.safe.std)
        if self.config.normalize:
            std = standard_deviation(table)
            a, b = _divide(a, std), _divide(b, std)
        counts = table[..., COUNT]
        values = self._relative(a, b, counts.clamp(min=1))
        if self.config.reduce == "median":
            return values.quantile(0.5, dim=1), values  # mean of the middle two
        if self.config.reduce == "weighted":
            return (values * counts).sum(1) / counts.sum(1), values
        return values.mean(1), values

    def evidence(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Both references contribute, the safe one negatively, or the unsafe one alone."""
        config, entries = self.config, table[:, COUNT].clamp(min=1)
        factors = torch.stack([_divide(1.0, r.std) for r in (self.unsafe, self.safe)], dim=1)
        if config.normalize:
            factors *= _divide(1.0, standard_deviation(table))[:, None]
        if config.relative == "share":
            total = (table[:, DOTS:] * factors).abs().sum(1)
            factors *= _divide(1.0, total)[:, None]
        else:
            factors /= entries[:, None]
        # A signed share is measured from 0, an unsigned one from the neutral a = b.
        two_sided = config.relative == "difference" or (
            config.relative == "share" and config.unsigned
        )
        factors[:, 1] *= -1.0 if two_sided else 0.0
        counts = table[:, COUNT] if config.reduce == "weighted" else torch.ones_like(entries)
        return factors, counts / counts.sum()

    def _relative(self, a: Tensor, b: Tensor, entries: Tensor) -> Tensor:
        kind = self.config.relative
        if kind == "share":
            total = a.abs() + b.abs()
            # Signed sums keep their sign in the numerator. Without any evidence: the neutral value.
            neutral = 0.5 if self.config.unsigned else 0.0
            return torch.where(total > 0, a / total, neutral)
        if kind == "ratio":
            return torch.where((a == 0) & (b == 0), 1.0, a / b)
        if kind == "logratio":
            return torch.where((a == 0) & (b == 0), 0.0, (a / b).log())
        return (a - b if kind == "difference" else a) / entries


class Cascade(GradCoo):
    """The NLL of the response outside the band, GradCoo inside it; GradCoo before calibration."""

    def score(self, gradients: GradientPass, group: Group, keep: bool = True) -> Scores:
        """Forward passes for all items, gradients where the NLL is not decisive."""
        band, (items, owners) = self.state.band, group
        if band is None:
            return super().score(gradients, group, keep)
        nll = gradients.losses(items, None, "NLL")
        unsure, values = band.unsure(nll), band.sure_scores(nll)
        components = torch.full((len(items), self.components.size if keep else 0), torch.nan)
        chosen = unsure.nonzero()[:, 0].tolist()
        if chosen:
            inside = [items[i] for i in chosen], [owners[i] for i in chosen]
            scores = super().score(gradients, inside, keep)
            values[chosen], components[chosen] = scores.values, scores.components
        return Scores(values, components, nll, unsure)


class GradSafe(Method):
    """Mean cosine to the unsafe reference over selected rows and columns (arXiv 2402.13494)."""

    granularity = "row+column"

    def __init__(self, state: DetectorState, layers: Layers) -> None:
        super().__init__(state, layers)
        self.unsafe = state.references["unsafe"]

    @classmethod
    def fit(cls, state: DetectorState, gradients: GradientPass, groups: Groups) -> Learned:
        """Build the unsafe reference, then select what separates the reference prompts."""
        components, gap = cls.component_map(state, gradients.layers), state.config.gap
        # As published: raw gradients, and no safe reference.
        unsafe, _ = build_reference(
            gradients, groups["unsafe"][0], components, state.config, "unsafe references", raw=True
        )
        state = replace(state, references={"unsafe": unsafe})
        method = cls(state, gradients.layers)
        scores = {name: method.score(gradients, group) for name, group in groups.items()}
        difference = scores["unsafe"].components.mean(0) - scores["safe"].components.mean(0)
        selected = difference > gap
        if not selected.any():
            raise ValueError(
                f"gradsafe.Detector.fit: no row or column separates the reference prompts by more "
                f"than gap={gap} (largest: {float(difference.max()):.3f}); lower gap= or choose "
                "references that the model treats differently"
            )
        losses = {name: found.nll for name, found in scores.items()}
        return replace(state, learned={"selected": selected}), losses

    def __call__(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of the selected slices and their mean."""
        norms = (table[..., SUM_SQ] * self.unsafe.sum_sq).sqrt()
        cosines = torch.where(norms > 0, table[..., DOTS] / norms, 0.0)  # a zero slice: cosine 0
        if self.selected is not None:
            cosines = cosines[:, self.selected]
        return cosines.mean(1), cosines

    def evidence(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse norms, with equal weights for the selected slices."""
        norms = (table[:, SUM_SQ] * self.unsafe.sum_sq).sqrt()
        chosen = torch.ones_like(norms) if self.selected is None else self.selected.to(norms)
        return torch.where(norms > 0, 1.0 / norms, 0.0)[:, None], chosen / chosen.sum()


class GradNorm(Method):
    """Norm of the scored gradients: a baseline without references."""

    def __call__(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of all gradients and of every component."""
        return table[..., SUM_SQ].sum(1).sqrt(), table[..., SUM_SQ].sqrt()


class NLL(Method):
    """NLL of the response, from a forward pass: a baseline without components."""

    def score(self, gradients: GradientPass, group: Group, keep: bool = True) -> Scores:
        """The NLL is the score."""
        nll = gradients.losses(group[0], None, "NLL")
        return Scores(nll.clone(), nll.new_empty(len(nll), 0), nll, torch.zeros_like(nll).bool())

    @property
    def names(self) -> list[str]:
        """There are no components."""
        return []


METHODS: dict[str, type[Method]] = {
    "gradcoo": GradCoo,
    "gradsafe": GradSafe,
    "cascade": Cascade,
    "nll": NLL,
    "gradnorm": GradNorm,
}


def _divide(dots: Tensor | float, std: Tensor) -> Tensor:
    """A component without spread has no direction: its value is zero."""
    return torch.where(std > 0, dots / std, 0.0)

"""The score methods, one class each, and how they are fitted.

A new method is a class here, an entry of `METHODS`, and its name in `config.Method`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gradsafe.detection.components import COUNT, DOTS, SUM_SQ, standard_deviation
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.gradients import EncodedPrompts, GradientPass
from gradsafe.detection.references import build_reference, find_output_projections
from gradsafe.detection.scoring import Groups, Learned, Method, Scores
from gradsafe.detection.state import DetectorState
from gradsafe.models import Layers

MIN_REFERENCE_GAP = 1.0  # nats


class ReferenceGapWarning(UserWarning):
    """The NLL, which method "cascade" relies on, does not tell the references apart."""


class CoverageWarning(UserWarning):
    """Less than half of the weights of the chosen blocks are scored."""


class GradCoo(Method):
    """Unsigned co-occurrence with an unsafe and a safe reference (arXiv 2502.12411).

    With n(g) = abs(g) / std(g): a_c = <n(g_c), n(unsafe_c)>, b_c the same with the safe reference;
    the score is the mean over components of a relative value such as a_c / (a_c + b_c).
    """

    def __init__(self, state: DetectorState, layers: Layers) -> None:
        super().__init__(state, layers)
        self.unsigned = self.config.unsigned
        divide = self.config.normalize and self.config.reference_order == "mean_then_norm"
        sums = [state.references[name].sums for name in ("unsafe", "safe")]
        # What the dots with each reference are divided by.
        self.stds = [
            standard_deviation(s) if divide else torch.ones_like(s[:, COUNT]) for s in sums
        ]

    @classmethod
    def fit(cls, state: DetectorState, gradients: GradientPass, groups: Groups) -> Learned:
        """Build both references."""
        components = cls.component_map(state, gradients.layers)
        references, losses = {}, {}
        for name, group in groups.items():
            references[name], losses[name] = build_reference(
                gradients, group.items, components, state.config.unsigned, f"{name} references"
            )
        return replace(state, references=references), losses

    def __call__(self, table: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Relative values and their mean, weighted mean or median."""
        a, b = (_divide(table[..., DOTS + k], std) for k, std in enumerate(self.stds))
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
        factors = torch.stack([_divide(1.0, std) for std in self.stds], dim=1)
        if config.normalize:
            factors *= _divide(1.0, standard_deviation(table))[:, None]
        if config.relative == "share":
            total = (table[:, DOTS:] * factors).abs().sum(1)
            factors *= _divide(1.0, total)[:, None]
        else:
            factors /= entries[:, None]
        # A signed share is measured from 0, an unsigned one from the neutral a = b.
        neutral_share = config.relative == "share" and config.unsigned
        factors[:, 1] *= -1.0 if neutral_share or config.relative == "difference" else 0.0
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

    def score(self, gradients: GradientPass, prompts: EncodedPrompts, keep: bool = True) -> Scores:
        """Forward passes for all windows, gradients where the NLL is not decisive."""
        band, items, owners = self.state.band, prompts.items, prompts.owners
        if band is None:
            return super().score(gradients, prompts, keep)
        nll = gradients.losses(items, None, "NLL")
        unsure, values = band.unsure(nll), band.sure_scores(nll)
        shape = (len(items), self.components.size if keep else 0)
        components = torch.full(shape, torch.nan, dtype=torch.float32)
        chosen = unsure.nonzero()[:, 0].tolist()
        if chosen:
            names = [prompts.names[owners[i]] for i in chosen]
            inside = EncodedPrompts(names, [[items[i]] for i in chosen])
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
        items, label = groups["unsafe"].items, "unsafe references"
        # As published: signed gradients, and no safe reference.
        unsafe, _ = build_reference(gradients, items, components, unsigned=False, label=label)
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

    def __call__(self, table: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines of the selected slices and their mean."""
        norms = (table[..., SUM_SQ] * self.unsafe.sums[:, SUM_SQ]).sqrt()
        cosines = _divide(table[..., DOTS], norms)
        if self.selected is not None:
            cosines = cosines[:, self.selected]
        return cosines.mean(1), cosines

    def evidence(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse norms, with equal weights for the selected slices."""
        norms = (table[:, SUM_SQ] * self.unsafe.sums[:, SUM_SQ]).sqrt()
        chosen = torch.ones_like(norms) if self.selected is None else self.selected.to(norms)
        return _divide(1.0, norms)[:, None], chosen / chosen.sum()


class GradNorm(Method):
    """Norm of the scored gradients: a baseline without references."""

    def __call__(self, table: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of all gradients and of every component."""
        return table[..., SUM_SQ].sum(1).sqrt(), table[..., SUM_SQ].sqrt()


class NLL(Method):
    """NLL of the response, from a forward pass: a baseline without components."""

    def score(self, gradients: GradientPass, prompts: EncodedPrompts, keep: bool = True) -> Scores:
        """The NLL is the score."""
        nll = gradients.losses(prompts.items, None, "NLL")
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


def fit(gradients: GradientPass, groups: Groups) -> DetectorState:
    """See `Detector.fit`; `groups` are the encoded "unsafe" and "safe" prompts, or empty."""
    config, layers = gradients.config, gradients.layers
    state = DetectorState(config, gradients.rows)
    share = layers.scored_parameters / max(1, layers.block_parameters)
    if config.method != "nll" and config.modules == "all" and share < 0.5:
        warnings.warn(
            f"gradsafe.Detector.fit: only {100 * share:.0f} % of the weights of the chosen blocks "
            f"are scored, and the gradients of the others are ignored; {layers}",
            CoverageWarning,
            stacklevel=3,
        )
    if groups:
        _check_stacks(config, layers)
    if config.granularity == "head":
        item = groups["safe"].items[0]
        state = replace(state, output_projections=find_output_projections(gradients, item))
    state, losses = METHODS[config.method].fit(state, gradients, groups)
    return replace(state, reference_gap=_reference_gap(config, losses)) if losses else state


def _check_stacks(config: DetectorConfig, layers: Layers) -> None:
    """Refuse options that would need the gradient of all experts of a layer at once."""
    stack = next((layer.name for layer in layers.scored if layer.experts), None)
    for name, value in (("center", True), ("reference_order", "norm_then_mean")):
        if stack is not None and getattr(config, name) == value:
            raise ValueError(
                f"gradsafe.Detector.fit: {name}={value!r} changes the gradients of experts that a "
                f"prompt does not use, and {stack} is a stack of experts; leave {name} out, or "
                'score modules="attention"'
            )


def _reference_gap(config: DetectorConfig, losses: Mapping[str, Tensor]) -> float:
    unsafe, safe = (float(losses[name].mean()) for name in ("unsafe", "safe"))
    # Gradients separate prompts after which the losses are alike, and the other way round: see the
    # measurements in docs/detection.md. Only the cascade relies on the loss.
    if config.method == "cascade" and unsafe - safe < MIN_REFERENCE_GAP:
        warnings.warn(
            f"gradsafe.Detector.fit: the mean NLL of {config.response!r} is {unsafe:.2f} after the "
            f"unsafe and {safe:.2f} after the safe references, a gap of {unsafe - safe:.2f} nats "
            f"(expected at least {MIN_REFERENCE_GAP:g}): the loss does not tell them apart, so "
            'method "cascade" will clear unsafe prompts or save nothing; use method "gradcoo", or '
            "choose references in the style of your traffic that the model refuses",
            ReferenceGapWarning,
            stacklevel=4,
        )
    return unsafe - safe


def _divide(dots: Tensor | float, spread: Tensor) -> Tensor:
    """A component without spread, or a zero slice, has no direction: its value is zero."""
    return torch.where(spread > 0, dots / spread, 0.0)

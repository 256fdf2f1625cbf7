"""From reference prompts to a method that scores: references, selected slices, and a warning."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from gradsafe.detection.components import ComponentMap
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.gradients import GradientPass
from gradsafe.detection.methods import GradCoo, GradientMethod, GradNorm, GradSafe
from gradsafe.detection.references import (
    Reference,
    build_reference,
    find_output_projections,
)
from gradsafe.detection.scoring import score_with_gradients
from gradsafe.models import Encoded, Layers

MIN_REFERENCE_GAP = 1.0  # nats

# Encoded windows and the number of the prompt each belongs to.
Group = tuple[list[Encoded], list[int]]


class ReferenceGapWarning(UserWarning):
    """The model answers the unsafe reference prompts as readily as the safe ones."""


class CoverageWarning(UserWarning):
    """Less than half of the weights of the chosen blocks are scored."""


@dataclass
class Fitted:
    """What fitting found; None for what the method has not."""

    method: GradientMethod | None = None
    components: ComponentMap | None = None
    reference_gap: float | None = None


def fit_without_references(config: DetectorConfig, gradients: GradientPass) -> Fitted:
    """Methods "nll" and "gradnorm"."""
    if config.method == "nll":
        return Fitted()
    return Fitted(GradNorm(), ComponentMap(gradients.layers, "tensor", rows=gradients.rows))


def fit_references(
    config: DetectorConfig,
    gradients: GradientPass,
    unsafe: Group,
    safe: Group,
    progress: bool,
) -> Fitted:
    """Methods that compare with references; see `Detector.fit`."""
    _check_stacks(config, gradients.layers)
    groups = {"unsafe": unsafe, "safe": safe}
    granularity = "row+column" if config.method == "gradsafe" else config.granularity
    projections: list[str] = []
    if granularity == "head":
        projections = find_output_projections(gradients, safe[0][0])
    components = ComponentMap(gradients.layers, granularity, projections, gradients.rows)
    built: dict[str, Reference] = {}
    for name, (items, _) in groups.items():
        label = f"{name} references" if progress else None
        if config.method == "gradsafe" and name == "safe":  # published: no safe reference
            continue
        built[name] = build_reference(gradients, items, components, config, label)
    method: GradientMethod
    if config.method == "gradsafe":
        method = GradSafe(built["unsafe"])
        scores = {
            name: score_with_gradients(
                method, components, config, gradients, items, owners, True, None
            )
            for name, (items, owners) in groups.items()
        }
        method.select(scores["unsafe"].components, scores["safe"].components, config.gap)
        losses = {name: score.nll for name, score in scores.items()}
    else:
        method = GradCoo(config, built["unsafe"], built["safe"])
        losses = {name: reference.nll for name, reference in built.items()}
    return Fitted(method, components, _check_gap(config, losses))


def check_coverage(config: DetectorConfig, layers: Layers) -> None:
    """Warn where less than half of the weights of the chosen blocks are scored."""
    share = layers.scored_parameters / max(1, layers.block_parameters)
    if config.modules == "all" and share < 0.5:
        warnings.warn(
            f"gradsafe.Detector.fit: only {100 * share:.0f} % of the weights of the chosen blocks "
            f"are scored, and what the others would say is not seen; {layers}",
            CoverageWarning,
            stacklevel=3,
        )


def _check_stacks(config: DetectorConfig, layers: Layers) -> None:
    """Refuse options that would need the gradient of all experts of a layer at once."""
    stack = next((layer.name for layer in layers.scored if layer.experts), None)
    for name, value in (("center", True), ("reference_order", "norm_then_mean")):
        if stack is not None and getattr(config, name) == value:
            raise ValueError(
                f"gradsafe.Detector.fit: {name}={value!r} changes the gradients of experts that a "
                f"prompt never reaches, and {stack} is a stack of experts; leave {name} out, or "
                'score modules="attention"'
            )


def _check_gap(config: DetectorConfig, losses: dict[str, Tensor]) -> float:
    unsafe, safe = (float(losses[name].mean()) for name in ("unsafe", "safe"))
    if unsafe - safe < MIN_REFERENCE_GAP:
        warnings.warn(
            f"gradsafe.Detector.fit: the mean NLL of {config.response!r} is {unsafe:.2f} after the "
            f"unsafe and {safe:.2f} after the safe references, a gap of {unsafe - safe:.2f} nats "
            f"(expected at least {MIN_REFERENCE_GAP:g}): this model does not refuse the unsafe "
            "references, so scores will be poor. Choose references in the style of your traffic "
            "that the model refuses.",
            ReferenceGapWarning,
            stacklevel=4,
        )
    return unsafe - safe

"""From reference prompts to a fitted state, with warnings about causes of poor scores."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.gradients import GradientPass
from gradsafe.detection.methods import METHODS
from gradsafe.detection.references import find_output_projections
from gradsafe.detection.scoring import Groups
from gradsafe.detection.state import DetectorState
from gradsafe.models import Layers

MIN_REFERENCE_GAP = 1.0  # nats


class ReferenceGapWarning(UserWarning):
    """The model answers the unsafe reference prompts as readily as the safe ones."""


class CoverageWarning(UserWarning):
    """Less than half of the weights of the chosen blocks are scored."""


def fit(config: DetectorConfig, gradients: GradientPass, groups: Groups) -> DetectorState:
    """See `Detector.fit`; `groups` are the encoded "unsafe" and "safe" prompts, or empty."""
    state = DetectorState(config, gradients.rows)
    if config.uses_gradients:
        _check_coverage(config, gradients.layers)
    if groups:
        _check_stacks(config, gradients.layers)
    if config.granularity == "head":
        item = groups["safe"][0][0]
        state = replace(state, output_projections=find_output_projections(gradients, item))
    state, losses = METHODS[config.method].fit(state, gradients, groups)
    return replace(state, reference_gap=_reference_gap(config, losses)) if losses else state


def _check_coverage(config: DetectorConfig, layers: Layers) -> None:
    share = layers.scored_parameters / max(1, layers.block_parameters)
    if config.modules == "all" and share < 0.5:
        warnings.warn(
            f"gradsafe.Detector.fit: only {100 * share:.0f} % of the weights of the chosen blocks "
            f"are scored, and the gradients of the others are ignored; {layers}",
            CoverageWarning,
            stacklevel=4,
        )


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

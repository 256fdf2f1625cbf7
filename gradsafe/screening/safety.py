"""The safety gradient: of refusals alone or of a margin, as it is or over Adam's step size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradsafe.detection.components import DOTS, SUM_SQ, ComponentMap, slice_values
from gradsafe.detection.factors import Factors, MatrixFactors
from gradsafe.detection.gradients import GradientPass
from gradsafe.detection.references import DTYPES, Reference, build_reference, storage_scale
from gradsafe.models import Encoded, LinearLayer
from gradsafe.ops import moments

EPS = 1e-8  # Adam's


def safety_gradient(
    gradients: GradientPass,
    components: ComponentMap,
    alignment: Sequence[Encoded],
    unsafe: Sequence[Encoded],
    sample: Sequence[Encoded],
) -> Reference:
    """The signed gradient of the safety loss.

    The loss is the mean NLL of the refusals in `alignment`. With `unsafe` rows it is a margin: the
    NLL of the refusals minus that of the harmful answers, each gradient divided by its norm, so
    that both count the same. With a `sample` of the rows to be screened it is divided entrywise by
    the step size of Adam, see `_adam_roots`. Up to two float32 copies of the scored weights exist
    at a time.
    """
    dtype = DTYPES[gradients.config.reference_dtype]
    exact = replace(gradients, config=replace(gradients.config, reference_dtype="float32"))
    refusals, _ = build_reference(exact, alignment, components, False, "alignment")
    if not (unsafe or sample):
        return _stored(refusals, components, lambda name, weight: weight, dtype)
    if unsafe:
        harmful, _ = build_reference(exact, unsafe, components, False, "unsafe")
        norms = [float(r.sums[:, SUM_SQ].sum().sqrt()) or 1.0 for r in (refusals, harmful)]

        def margin(name: str, weight: Tensor) -> Tensor:
            other = harmful.weights.pop(name).mul_(harmful.scales[name] / norms[1])
            return weight.div_(norms[0]).sub_(other)

        refusals = _stored(refusals, components, margin, torch.float32)
    if not sample:
        return _stored(refusals, components, lambda name, weight: weight, dtype)
    roots = _adam_roots(gradients, sample)

    def scaled(name: str, weight: Tensor) -> Tensor:
        root = roots.pop(name)
        return torch.where(root > 0, weight / (root + EPS), 0.0)

    return _stored(refusals, components, scaled, dtype)


def _adam_roots(gradients: GradientPass, items: Sequence[Encoded]) -> dict[str, Tensor]:
    """The root of Adam's second moments, by layer, estimated from a sample of rows.

    A step of Adam on a row moves a weight by -eta m / (sqrt(v) + eps), so to first order the safety
    loss changes by -eta <a, g / (sqrt(v) + eps)> = -eta <a / (sqrt(v) + eps), g>: the scaling can
    be put on the safety gradient a. As in LESS (arXiv 2402.04333, section 2), with two differences:
    the row's gradient g stands for m, since nothing was trained yet, and v is the mean of g_i^2
    over the rows of the sample, which is Adam's bias-corrected average for beta_2 -> 1. An entry
    that no row of the sample moves has no estimate; the caller makes it zero.
    """
    squares: dict[str, Tensor] = {}

    def visit(layer: LinearLayer, factors: Factors) -> None:
        if not isinstance(factors, MatrixFactors):
            raise ValueError(
                f'gradsafe.Screener.fit: scale="adam" needs plain weights, and {layer.name} is a '
                'stack of experts; use scale="none", or score modules="attention"'
            )
        for x, dy in factors.samples():
            grad = dy.float().t() @ x.float()
            total = squares.setdefault(layer.name, torch.zeros_like(grad))
            total.addcmul_(grad, grad, value=1 / len(items))

    gradients.losses(items, visit, "second moments")
    return {name: total.sqrt_() for name, total in squares.items()}


def _stored(
    reference: Reference,
    components: ComponentMap,
    change: Callable[[str, Tensor], Tensor],
    dtype: torch.dtype,
) -> Reference:
    """A float32 reference after a change of each weight, with its sums, stored as `dtype`."""
    weights, scales, sums = {}, {}, torch.zeros_like(reference.sums)
    for name, weight in reference.weights.items():
        found = change(name, weight.mul_(reference.scales[name]))
        matrices = list(found.view(-1, *found.shape[-2:]))
        values = slice_values(moments(matrices))[:, 0, :DOTS].cpu()
        sums.index_add_(0, components.by_name(name)[1], values)
        scales[name] = storage_scale(found, dtype)
        weights[name] = (found / scales[name]).to(dtype)
    return replace(reference, weights=weights, scales=scales, sums=sums)

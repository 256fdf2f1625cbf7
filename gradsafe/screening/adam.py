"""What Adam would do to a step: the safety gradient over the root of second moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradsafe.detection.components import DOTS, ComponentMap, slice_values
from gradsafe.detection.factors import Factors, MatrixFactors
from gradsafe.detection.gradients import GradientPass
from gradsafe.detection.references import DTYPES, Reference, storage_scale
from gradsafe.models import Encoded, LinearLayer
from gradsafe.ops import moments

EPS = 1e-8  # Adam's


def adam_scaled(
    reference: Reference,
    gradients: GradientPass,
    items: Sequence[Encoded],
    components: ComponentMap,
) -> Reference:
    """Divide a reference entrywise by the step size of Adam, estimated from a sample of rows.

    A step of Adam on a row moves a weight by -eta m / (sqrt(v) + eps), so to first order the safety
    loss changes by -eta <a, g / (sqrt(v) + eps)> = -eta <a / (sqrt(v) + eps), g>: the scaling can
    be put on the safety gradient a. As in LESS (arXiv 2402.04333, section 2), with two differences:
    the row's gradient g stands for m, since nothing was trained yet, and v is the mean of g_i^2
    over the n rows of the sample, which is Adam's bias-corrected average for beta_2 -> 1. An entry
    that no row of the sample moves has no estimate; it becomes zero.

    Args:
        reference: The safety gradient, stored as float32.
        gradients: The pass; one float32 copy of all scored weights is kept during it.
        items: The sample, some of the rows to be screened.
        components: One component per weight.

    Returns:
        The scaled reference in the storage type of `gradients.config`.
    """
    squares: dict[str, Tensor] = {}
    places: dict[str, int] = {}

    def visit(layer: LinearLayer, factors: Factors) -> None:
        if layer.name not in squares:
            squares[layer.name] = torch.zeros_like(reference.weights[layer.name])
        total, places[layer.name] = squares[layer.name], int(components[layer][1][0])
        if not isinstance(factors, MatrixFactors):
            raise ValueError(
                f'gradsafe.Screener.fit: scale="adam" needs plain weights, and {layer.name} is a '
                'stack of experts; use scale="none", or score modules="attention"'
            )
        for x, dy in factors.samples():
            grad = dy.float().t() @ x.float()
            total.addcmul_(grad, grad, value=1 / len(items))

    gradients.losses(items, visit, "second moments")
    dtype = DTYPES[gradients.config.reference_dtype]
    weights, scales, sums = {}, {}, reference.sums.clone()
    for name, weight in reference.weights.items():
        root = squares.pop(name).sqrt_()
        scaled = torch.where(root > 0, weight * reference.scales[name] / (root + EPS), 0.0)
        scales[name] = storage_scale(scaled, dtype)
        weights[name] = (scaled / scales[name]).to(dtype)
        sums[places[name]] = slice_values(moments([scaled]))[0, 0, :DOTS].cpu()
    return replace(reference, weights=weights, scales=scales, sums=sums)

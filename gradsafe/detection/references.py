"""Reference gradients: the mean gradient of a few prompts, kept for every scored weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.detection.components import ComponentMap, slice_values, standard_deviation
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.factors import Factors, MatrixFactors, Prepare
from gradsafe.detection.gradients import GradientPass, NonFiniteGradientError
from gradsafe.models import Encoded, LinearLayer
from gradsafe.ops import Axis, Moments, moments

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class Reference:
    """The reference gradient of one group of prompts (unsafe or safe).

    The scales keep the small entries of small layers inside the range of 16-bit floats.
    """

    weights: dict[str, Tensor]  # by layer: [R, I] or [E, R, I], divided by the layer's scale
    scales: dict[str, float]
    sums: Tensor  # [C, 3] float64: count, sum and sum of squares per component


def prepare_function(config: DetectorConfig) -> Prepare | None:
    """What changes a gradient in place before its moments are taken; None for nothing."""
    if config.center:
        return _subtract_mean_  # of every slice
    return (lambda grad, _: grad.abs_()) if config.absolute == "before" else None


def _subtract_mean_(grad: Tensor, axis: Axis) -> Tensor:
    result = moments([grad], None, axis)
    assert isinstance(result, Moments)
    mean = (result.sum[0] / result.count[0]).to(grad.dtype)
    return grad.sub_(mean[:, None] if axis == "row" else mean)


def find_output_projections(gradients: GradientPass, item: Encoded) -> tuple[str, ...]:
    """Output layers of the attention modules: the backward pass reaches them first."""
    first: dict[str, LinearLayer] = {}

    def visit(layer: LinearLayer, factors: Factors) -> None:
        first.setdefault(layer.name.rpartition(".")[0], layer)

    gradients.losses([item], visit)
    return tuple(sorted(layer.name for layer in first.values() if layer.role == "attention"))


def build_reference(
    gradients: GradientPass,
    items: Sequence[Encoded],
    components: ComponentMap,
    unsigned: bool,
    label: str,
) -> tuple[Reference, Tensor]:
    """Build one group's reference; also returns the `[n]` NLL of the response after each prompt.

    The mean over prompts of G_b = dy_b^T x_b is one product over the tokens of all prompts, for a
    stack of experts one per expert and prompt. If the group does not fit one batch, float32 sums of
    all layers are kept until the last batch. `unsigned` references are stored as absolute values.
    """
    config = gradients.config
    table = torch.zeros(components.size, 3, dtype=torch.float64)
    sums: dict[str, Tensor] = {}  # of the layers that are not finished
    done: Counter[str] = Counter()  # samples per layer
    weights: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    prepare = prepare_function(config)
    per_prompt = config.normalize and config.reference_order == "norm_then_mean"
    dtype = DTYPES[config.reference_dtype]

    def visit(layer: LinearLayer, factors: Factors) -> None:
        total = sums.pop(layer.name, None)
        if total is None:
            stack = (layer.experts,) if layer.experts else ()
            shape = (*stack, factors.dy.shape[-1], factors.x.shape[-1])
            total = torch.zeros(shape, device=factors.dy.device, dtype=torch.float32)
        if per_prompt:
            assert isinstance(factors, MatrixFactors)
            for x, dy in factors.samples():
                grad = dy.float().t() @ x.float()
                _normalize_(grad, layer, components, config)
                total.add_(grad, alpha=1 / len(items))
        else:
            factors.add_mean(total, len(items))
        done[layer.name] += len(factors)
        if done[layer.name] < len(items):
            sums[layer.name] = total
            return
        axis, index = components[layer]
        matrices = list(total.view(-1, *total.shape[-2:]))
        if prepare is not None and not per_prompt:
            for matrix in matrices:
                prepare(matrix, axis)
        values = slice_values(moments(matrices, None, axis)).flatten(0, 1).cpu()
        if not torch.isfinite(values).all():
            raise NonFiniteGradientError(
                f"gradsafe.{gradients.owner}.fit: the reference gradient of {layer.name} holds "
                "NaN or Inf; check the model's weights, or run it in bfloat16 or float32"
            )
        table.index_add_(0, index, values)
        if unsigned:
            total.abs_()
        scales[layer.name] = storage_scale(total, dtype)
        weights[layer.name] = (total / scales[layer.name]).to(dtype)

    nll = gradients.losses(items, visit, label)
    return Reference(weights, scales, table), nll


def storage_scale(grad: Tensor, dtype: torch.dtype) -> float:
    """What a reference is divided by before it is stored; 1 for a zero one.

    Types with a wide exponent hold any spread around a root mean square of one. e4m3 spans 2^-9 to
    448: there the largest entry becomes 448, and entries below about 1e-5 of it become zero.
    """
    if not grad.numel():
        return 1.0
    if dtype == torch.float8_e4m3fn:
        return float(grad.abs().max()) / torch.finfo(dtype).max or 1.0
    return float(grad.square().mean().sqrt()) or 1.0


def _normalize_(
    grad: Tensor, layer: LinearLayer, components: ComponentMap, config: DetectorConfig
) -> None:
    """One prompt's gradient to abs(g) / std(g) per component, in place ("norm_then_mean")."""
    axis, index = components[layer]
    prepare = prepare_function(config)
    if prepare is not None:
        prepare(grad, axis)
    values = slice_values(moments([grad], None, axis))[0].cpu()
    index = index - index.min()
    sums = values.new_zeros(int(index.max()) + 1, values.shape[1]).index_add_(0, index, values)
    std = standard_deviation(sums)
    inverse = torch.where(std > 0, 1 / std, 0.0)[index].to(grad)
    grad.mul_(inverse[:, None] if axis == "row" else inverse)
    if config.unsigned:
        grad.abs_()

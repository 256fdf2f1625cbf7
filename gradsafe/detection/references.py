"""Reference gradients: the mean gradient of a few prompts, kept for every scored weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradsafe.detection.components import ComponentMap, slice_values, standard_deviation
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.factors import Buffers, Factors, MatrixFactors
from gradsafe.detection.gradients import GradientPass, NonFiniteGradientError, Visit
from gradsafe.models import Encoded, LinearLayer
from gradsafe.ops import Axis, Moments, moments

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}


@dataclass
class Reference:
    """The reference gradient of one group of prompts (unsafe or safe).

    Attributes:
        weights: Per layer name `[R, I]` (`[E, R, I]` for a stack of experts) in the storage dtype,
            divided by the layer's scale; R are the rows that take part, all O unless `row_fraction`
            says otherwise.
        scales: Per layer name the scale, so that the true reference is weights * scale. It keeps
            the small entries of small layers inside the range of 16-bit floats.
        std: `[C]` float64, standard deviation of the reference gradient per component; what the
            dots are divided by. Ones where nothing is to be divided.
        sum_sq: `[C]` float64, squared norm of the reference gradient per component.
        nll: `[n]` float32, loss of the response after each reference prompt.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    std: Tensor = field(default_factory=lambda: torch.empty(0))
    sum_sq: Tensor = field(default_factory=lambda: torch.empty(0))
    nll: Tensor = field(default_factory=lambda: torch.empty(0))


def prepare_function(config: DetectorConfig) -> Callable[[Tensor, Axis], None] | None:
    """What happens to a gradient before its moments are taken, in place; None for nothing."""
    if config.center:
        return subtract_mean_
    if config.absolute == "before":
        return absolute_
    return None


def absolute_(grad: Tensor, axis: Axis) -> None:
    """Absolute value in place; the same for every axis."""
    grad.abs_()


def subtract_mean_(grad: Tensor, axis: Axis) -> None:
    """Subtract the mean of every slice in place; axis "tensor", "row" or "column"."""
    result = moments([grad], None, axis)
    assert isinstance(result, Moments)
    mean = (result.sum[0] / result.count[0]).to(grad.dtype)
    grad.sub_(mean[:, None] if axis == "row" else mean)


def find_output_projections(gradients: GradientPass, item: Encoded) -> list[str]:
    """Layers at the end of an attention module: those the backward pass meets first in it."""
    seen: set[str] = set()
    found: list[str] = []

    def visit(layer: LinearLayer, factors: Factors) -> None:
        parent = layer.name.rpartition(".")[0]
        if layer.role == "attention" and parent not in seen:
            found.append(layer.name)
        seen.add(parent)

    gradients.run([item], lambda indices: visit)
    return found


def build_reference(
    gradients: GradientPass,
    items: Sequence[Encoded],
    components: ComponentMap,
    config: DetectorConfig,
    progress: str | None = None,
) -> Reference:
    """Build one group's reference.

    The mean over prompts of G_b = dy_b^T x_b is one product over the tokens of all prompts, for a
    stack of experts one per expert that they reach. While the group fits one batch, each layer's
    mean is finished as the backward pass reaches it; else float32 sums of all layers are kept until
    the last batch.

    Args:
        gradients: Runs the prompts.
        items: Encoded reference prompts.
        components: Components whose statistics are needed.
        config: Options.
        progress: Label of the progress bar, None for no bar.

    Returns:
        The reference.

    Raises:
        NonFiniteGradientError: The mean gradient of a layer holds NaN or Inf.
    """
    reference = Reference()
    table = torch.zeros(1, components.size, 3, dtype=torch.float64)
    sums: dict[str, Tensor] = {}
    left = len(items)
    buffers = Buffers()
    # Published GradSafe compares raw gradients: nothing is normalised, the sign stays.
    raw = config.method == "gradsafe"
    prepare = None if raw else prepare_function(config)
    per_prompt = not raw and config.normalize and config.reference_order == "norm_then_mean"

    def add(total: Tensor, layer: LinearLayer, factors: Factors) -> None:
        if not per_prompt:
            factors.add_mean(total, len(items))
            return
        assert isinstance(factors, MatrixFactors)
        for grad in factors.gradients(buffers):
            _normalize_(grad, layer, components, config)
            total.add_(grad, alpha=1 / len(items))

    def begin(indices: list[int]) -> Visit:
        nonlocal left
        left -= len(indices)
        last = left == 0

        def visit(layer: LinearLayer, factors: Factors) -> None:
            total = sums.pop(layer.name, None)
            if total is None:
                shape = (layer.experts,) if layer.experts else ()
                shape = (*shape, factors.dy.shape[-1], factors.x.shape[-1])
                total = torch.zeros(shape, device=factors.dy.device)
            add(total, layer, factors)
            if last:
                store(layer, total)
            else:
                sums[layer.name] = total

        return visit

    def store(layer: LinearLayer, grad: Tensor) -> None:
        axis = components[layer].axis
        matrices = list(grad.view(-1, *grad.shape[-2:]))
        if prepare is not None and not per_prompt:
            for matrix in matrices:
                prepare(matrix, axis)
        values = slice_values(moments(matrices, None, axis)).flatten(0, 1)[None].cpu()
        if not torch.isfinite(values).all():
            raise NonFiniteGradientError(
                f"gradsafe.Detector.fit: the reference gradient of {layer.name} holds NaN or Inf; "
                "check the model's weights, or run it in bfloat16 or float32"
            )
        components.add(table, layer, values)
        if config.unsigned and not raw:
            grad.abs_()
        dtype = DTYPES[config.reference_dtype]
        scale = _storage_scale(grad, dtype)
        reference.scales[layer.name] = scale
        reference.weights[layer.name] = (grad / scale).to(dtype)

    reference.nll = gradients.run(items, begin, progress=progress)
    divide = config.normalize and not per_prompt and not raw
    reference.std = standard_deviation(table[0]) if divide else torch.ones_like(table[0, :, 0])
    reference.sum_sq = table[0, :, 2].clone()
    return reference


def _storage_scale(grad: Tensor, dtype: torch.dtype) -> float:
    """What a reference is divided by before it is stored; a zero one by nothing.

    Wide exponents hold any spread around a root mean square of one. e4m3 spans 2^-9 to 448 only:
    there the largest entry goes to the top, and entries below a hundred-thousandth of it to zero.
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
    slices = components[layer]
    prepare = prepare_function(config)
    if prepare is not None:
        prepare(grad, slices.axis)
    values = slice_values(moments([grad], None, slices.axis))[0].cpu()
    first = int(slices.components.min())
    local = torch.zeros(int(slices.components.max()) - first + 1, values.shape[1]).double()
    local.index_add_(0, slices.components - first, values)
    std = standard_deviation(local)
    inverse = torch.where(std > 0, 1 / std, 0.0)[slices.components - first].to(grad)
    grad.mul_(inverse[:, None] if slices.axis == "row" else inverse)
    if config.unsigned:
        grad.abs_()

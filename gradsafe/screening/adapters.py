"""Gradients of LoRA parameters, from the inputs and output gradients of the wrapped layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.detection.factors import Factors, MatrixFactors
from gradsafe.detection.gradients import GradientPass, Visit
from gradsafe.models import Encoded, Layers, LinearLayer


@dataclass(frozen=True)
class AdapterPass(GradientPass):
    """A pass that visits the LoRA matrices of each layer in place of its weight.

    With y = W x + s B A x, the gradient of B is dy^T (s x A^T) `[O, r]`, that of A is
    (s dy B)^T x `[r, I]`: both are products over tokens like that of a weight, of rank r.
    """

    def run(
        self, items: Sequence[Encoded], visit: Visit | None, label: str, blocks: Sequence[int] = ()
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """As `GradientPass.run`."""

        def split(layer: LinearLayer, factors: Factors) -> None:
            assert visit is not None
            assert isinstance(factors, MatrixFactors)
            x, dy = factors.x.float(), factors.dy.float()
            for name, (down, up, scale) in _adapters(layer).items():
                a, b = down.float(), up.float()
                parts = factors.lengths, factors.repeat
                inner = (scale * x) @ a.t()
                visit(_of_a(layer, name, a), MatrixFactors(x, (scale * dy) @ b, *parts))
                visit(_of_b(layer, name, b), MatrixFactors(inner, dy, *parts))

        yield from super().run(items, visit and split, label, blocks)


def adapted(layers: Layers) -> tuple[Layers, Layers]:
    """The layers of a model that have LoRA adapters, and the matrices of these adapters.

    Raises:
        ValueError: There are none, or a layer's adapter is merged or no plain LoRA.
    """
    chosen = [layer for layer in layers.scored if _adapters(layer)]
    if not chosen:
        refuse(
            "Screener.fit",
            'a model with LoRA adapters for parameters="lora"',
            "none in the scored layers",
            'wrap the model with peft.get_peft_model, or use parameters="weights"',
        )
    matrices = [
        make(layer, name, matrix)
        for layer in chosen
        for name, (down, up, _) in _adapters(layer).items()
        for make, matrix in ((_of_a, down), (_of_b, up))
    ]
    return replace(layers, scored=chosen), replace(layers, scored=matrices)


def _adapters(layer: LinearLayer) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A `[r, I]`, B `[O, r]` and the scale of every active LoRA adapter of a layer."""
    module: Any = layer.module
    if layer.experts or not hasattr(module, "lora_A"):
        return {}
    found = {}
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if module.merged or name in getattr(module, "lora_variant", {}):
            reason = "merged into the weight" if module.merged else "a variant of LoRA"
            refuse(
                "Screener.fit",
                'plain LoRA adapters for parameters="lora"',
                f"{layer.name}, whose adapter {name!r} is {reason}",
                'use parameters="weights"',
            )
        weights = module.lora_A[name].weight, module.lora_B[name].weight
        found[name] = (*(weight.detach() for weight in weights), float(module.scaling[name]))
    return found  # type: ignore[return-value]


def _of_a(layer: LinearLayer, adapter: str, matrix: Tensor) -> LinearLayer:
    return replace(layer, name=f"{layer.name}.lora_A.{adapter}", out_features=matrix.shape[0])


def _of_b(layer: LinearLayer, adapter: str, matrix: Tensor) -> LinearLayer:
    return replace(layer, name=f"{layer.name}.lora_B.{adapter}", in_features=matrix.shape[1])

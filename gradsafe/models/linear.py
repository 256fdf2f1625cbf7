"""What is one linear layer, whatever stores its weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradsafe.models.compat import LINEAR_SIZES


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return `(out_features, in_features)` of a linear-like module, else None.

    Linear-like are `nn.Linear` and everything that shows the same two integers (4- and 8-bit
    layers, GPTQ, AWQ), transformers' `Conv1D`, and a PEFT wrapper around one of these.
    """
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.weight.shape[0])
    inner = wrapped_layer(module)
    if inner is not None:
        # LoRA also wraps embeddings and raw expert weights: the wrapped module decides.
        return linear_shape(inner)
    for in_name, out_name in LINEAR_SIZES:
        size = (getattr(module, out_name, None), getattr(module, in_name, None))
        if all(type(value) is int and value > 0 for value in size):
            weight = getattr(module, "weight", None)
            stored = isinstance(weight, torch.Tensor) and weight.is_floating_point()
            # Stacked expert weights and convolutions have the attributes, not the arithmetic.
            return None if stored and weight.ndim != 2 else size  # type: ignore[union-attr, return-value]
    return None


def wrapped_layer(module: nn.Module) -> nn.Module | None:
    """Return the module inside a PEFT adapter layer, or None for any other module."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) and hasattr(module, "get_base_layer") else None


def without_adapters(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield `(qualified name, module)` down to linear-like modules, past the parts of adapters."""
    yield name, module
    if linear_shape(module) is not None:
        return
    inner = wrapped_layer(module)
    children = [("base_layer", inner)] if inner is not None else module.named_children()
    for child_name, child in children:
        yield from without_adapters(child, f"{name}.{child_name}" if name else child_name)

"""What is not scored, and why: every parameter outside the scored weights has a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradsafe.models.inspection import base_model
from gradsafe.models.linear import linear_shape, wrapped_layer

Key = tuple[int, str]  # id of a module, and name of its parameter


@dataclass(frozen=True)
class Skipped:
    """Parameters left out of scoring for one reason.

    Attributes:
        name: Qualified name; a `*` stands for the indices of the blocks that share it.
        reason: Why it is not scored.
        parameters: Number of entries.
    """

    name: str
    reason: str
    parameters: int


def skipped_parameters(
    model: nn.Module,
    blocks: nn.ModuleList,
    chosen: set[int],
    scored: set[Key],
    reasons: Mapping[Key, str],
) -> list[Skipped]:
    """List all parameters outside the scored weights, grouped over blocks, in model order.

    `chosen` are the indices of the blocks that may be scored, `reasons` say why other candidates
    are left out. A parameter shared by several modules counts once, at its first.
    """
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    base: Any = base_model(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    groups: Counter[tuple[str, str]] = Counter()
    seen: set[int] = set()
    for path, module in model.named_modules():
        owners = [model]  # from the model down to the module
        for part in path.split(".") if path else []:
            owners.append(getattr(owners[-1], part))
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            reason: str | None
            if path.startswith(f"{prefix}."):
                index, _, rest = f"{path}.{leaf}".removeprefix(f"{prefix}.").partition(".")
                reason, label = "outside the chosen blocks", f"{prefix}.*"
                if int(index) in chosen:
                    reason = _reason_in_block(owners, leaf, scored, reasons)
                    label = f"{prefix}.*.{rest}"
            else:
                reason, label = _reason_outside(owners, head), path or leaf
            if reason is not None:
                groups[label, reason] += parameter.numel()
    return [Skipped(label, reason, count) for (label, reason), count in groups.items()]


def _reason_in_block(
    owners: list[nn.Module], leaf: str, scored: set[Key], reasons: Mapping[Key, str]
) -> str | None:
    """Reason for one parameter of a chosen block; None for a scored weight."""
    owner = owners[-1]
    if (id(owner), leaf) in scored:
        return None
    for depth, wrapper in enumerate(owners[:-1]):
        if wrapped_layer(wrapper) is None:
            continue
        # Down the chain of adapter wrappers to the layer that holds the weight.
        inner: nn.Module | None = wrapper
        for below in owners[depth + 1 :]:
            inner = wrapped_layer(inner) if inner is not None else None
            if inner is not below:
                return "adapter (part of its layer's effective weight)"
        if (id(wrapper), leaf) in scored:
            return None
    has_scored = any((id(owner), name) in scored for name in owner._parameters)
    if leaf.endswith("bias") and (linear_shape(owner) is not None or has_scored):
        return "bias"
    for module in reversed(owners):
        if (id(module), leaf) in reasons:
            return reasons[id(module), leaf]
    if _is_norm(owner):
        return "norm"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "convolution"
    return f"no matrix ({type(owner).__name__})"


def _reason_outside(owners: list[nn.Module], head: object) -> str:
    if any(isinstance(module, nn.Embedding) for module in owners):
        return "embedding"
    if any(module is head for module in owners):
        return "output head"
    if _is_norm(owners[-1]):
        return "norm"
    return f"outside the decoder blocks ({type(owners[-1]).__name__})"


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()

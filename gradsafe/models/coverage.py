"""What is not scored, and why: every parameter outside the scored weights has a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradsafe.models.inspection import base_model
from gradsafe.models.linear import linear_shape, wrapped_layer


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
    scored: Sequence[tuple[nn.Module, str]],
    reasons: Mapping[tuple[int, str], str],
) -> list[Skipped]:
    """List all parameters outside the scored weights, grouped over blocks.

    Args:
        model: The model as the user holds it.
        blocks: Its decoder blocks.
        chosen: Indices of the blocks that may be scored.
        scored: Module and parameter name of the scored weights.
        reasons: Why other weights that were looked at are left out, by id of the module and name.

    Returns:
        Groups in model order. A parameter shared by several modules counts once, at its first.
    """
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names[id(blocks)]
    scored_keys = {(id(module), leaf) for module, leaf in scored}
    head = _output_head(model)
    groups: dict[tuple[str, str], int] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        owners = _ancestors(model, path)
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            reason: str | None
            if path.startswith(f"{prefix}."):
                index, _, rest = f"{path}.{leaf}".removeprefix(f"{prefix}.").partition(".")
                if int(index) in chosen:
                    reason = _reason_in_block(owners, leaf, scored_keys, reasons)
                    label = f"{prefix}.*.{rest}"
                else:
                    reason, label = "outside the chosen blocks", f"{prefix}.*"
            else:
                reason, label = _reason_outside(owners, head), path or leaf
            if reason is not None:
                groups[label, reason] = groups.get((label, reason), 0) + parameter.numel()
    return [Skipped(label, reason, count) for (label, reason), count in groups.items()]


def _reason_in_block(
    owners: list[nn.Module],
    leaf: str,
    scored: set[tuple[int, str]],
    reasons: Mapping[tuple[int, str], str],
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
    if leaf.endswith("bias") and (linear_shape(owner) is not None or _has_scored(owner, scored)):
        return "bias"
    for module in reversed(owners):
        reason = reasons.get((id(module), leaf))
        if reason is not None:
            return reason
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "convolution"
    return f"no matrix ({type(owner).__name__})"


def _has_scored(owner: nn.Module, scored: set[tuple[int, str]]) -> bool:
    return any((id(owner), name) in scored for name in owner._parameters)


def _reason_outside(owners: list[nn.Module], head: nn.Module | None) -> str:
    owner = owners[-1]
    if any(isinstance(module, nn.Embedding) for module in owners):
        return "embedding"
    if head is not None and any(module is head for module in owners):
        return "output head"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    return f"outside the decoder blocks ({type(owner).__name__})"


def _output_head(model: nn.Module) -> nn.Module | None:
    base: Any = base_model(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None


def _ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """Modules from the model down to the one at `path`."""
    owners = [model]
    for part in path.split(".") if path else []:
        owners.append(getattr(owners[-1], part))
    return owners

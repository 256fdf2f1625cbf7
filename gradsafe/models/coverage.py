"""What is not scored, and why: every parameter outside the scored weights has a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradsafe.models.inspection import base_model
from gradsafe.models.linear import is_router, linear_shape, wrapped_layer


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
    scored: Sequence[nn.Module],
) -> list[Skipped]:
    """List all parameters outside the scored weights, grouped over blocks.

    Args:
        model: The model as the user holds it.
        blocks: Its decoder blocks.
        chosen: Indices of the blocks that may be scored.
        scored: The scored modules.

    Returns:
        Groups in model order. A parameter shared by several modules counts once, at its first.
    """
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names[id(blocks)]
    scored_ids = {id(module) for module in scored}
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
                    reason = _reason_in_block(owners, leaf, scored_ids)
                    label = f"{prefix}.*.{rest}"
                else:
                    reason, label = "outside the chosen blocks", f"{prefix}.*"
            else:
                reason, label = _reason_outside(owners, head), path or leaf
            if reason is not None:
                groups[label, reason] = groups.get((label, reason), 0) + parameter.numel()
    return [Skipped(label, reason, count) for (label, reason), count in groups.items()]


def _reason_in_block(owners: list[nn.Module], leaf: str, scored_ids: set[int]) -> str | None:
    """Reason for one parameter of a chosen block; None for a scored weight."""
    for depth, owner in enumerate(owners):
        if id(owner) not in scored_ids:
            continue
        # Down the chain of adapter wrappers to the layer that holds the weight.
        inner: nn.Module | None = owner
        for below in owners[depth + 1 :]:
            inner = wrapped_layer(inner) if inner is not None else None
            if inner is not below:
                return "adapter (part of its layer's effective weight)"
        return "bias" if leaf == "bias" else None
    owner = owners[-1]
    if any(is_router(module) for module in owners):
        return "router"
    # The block list itself is an nn.ModuleList; a second one inside a block holds experts.
    if sum(isinstance(module, nn.ModuleList) for module in owners) > 1:
        return "list of experts (routed tokens)"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if linear_shape(owner) is not None:
        return "bias" if leaf == "bias" else "not in the chosen modules"
    return f"unsupported module {type(owner).__name__}"


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

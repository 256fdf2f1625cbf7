"""Every weight of the decoder's blocks that may take part in a matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from gradsafe.models.linear import linear_shape, without_adapters

Role = Literal["attention", "mlp"]
# How x and dy are reached: the module is called, its weight is used in a product elsewhere, or the
# module is a set of fused experts behind transformers' interface.
Use = Literal["call", "product", "experts"]


@dataclass(frozen=True)
class Candidate:
    """A weight that may be scored.

    Attributes:
        name: Qualified name of the module; of the parameter where that is not all of the module.
        module: Owner of the weight.
        around: Module around it.
        parameter: Name of the weight in its module.
        block: Index of the decoder block.
        role: "attention" inside an attention module, else "mlp".
        listed: Path of the list of modules inside the block that holds it, "" without one.
        twins: Other linear modules with the same weight; what they do adds up.
    """

    name: str
    module: nn.Module
    around: nn.Module
    parameter: str
    block: int
    role: Role
    listed: str
    twins: list[nn.Module] = field(default_factory=list)


def find_candidates(blocks: nn.ModuleList, prefix: str) -> list[Candidate]:
    """List the weights of all blocks, first block first; one in two places counts once.

    Args:
        blocks: Decoder blocks.
        prefix: Qualified name of the list.
    """
    found: list[Candidate] = []
    modules: set[int] = set()
    owners: dict[int, Candidate] = {}  # by id of the weight
    for index, block in enumerate(blocks):
        start = f"{prefix}.{index}"
        parents: dict[str, nn.Module] = {start.rpartition(".")[0]: blocks}
        for path, module in without_adapters(block, start):
            parents[path] = module
            if id(module) in modules:
                continue
            modules.add(id(module))
            around, place = parents[path.rpartition(".")[0]], _place(block, path, start)
            for leaf, name in _weights(module, path):
                weight = module._parameters.get(leaf)
                owner = owners.get(id(weight))
                if weight is not None and owner is not None:
                    owner.twins.append(module)
                    continue
                candidate = Candidate(name, module, around, leaf, index, *place)
                found.append(candidate)
                if weight is not None:
                    owners[id(weight)] = candidate
    return found


def _weights(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """Parameter name and full name of the weights that belong to this module itself."""
    if linear_shape(module) is not None:
        yield "weight", path
        return
    if _is_elementwise(module):
        return
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.ndim in (2, 3) and parameter.is_floating_point():
            # A module with one weight is called what its weight does.
            yield leaf, path if leaf == "weight" else f"{path}.{leaf}"


def _is_elementwise(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return True
    return isinstance(module, nn.modules.conv._ConvNd) or "norm" in type(module).__name__.lower()


def _place(block: nn.Module, path: str, start: str) -> tuple[Role, str]:
    """Role of a module, and the innermost list of modules that holds it."""
    module, role, listed = block, "mlp", ""
    walked = start
    for part in path.removeprefix(start).strip(".").split("."):
        if isinstance(module, nn.ModuleList):
            listed = walked
        kind = type(module).__name__.lower()
        if module is not block and ("attention" in kind or "attn" in kind):
            role = "attention"
        if part:
            module, walked = module.get_submodule(part), f"{walked}.{part}"
    return role, listed  # type: ignore[return-value]

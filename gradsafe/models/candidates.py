"""The weights of the decoder's blocks: those that may be scored, and those that are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from gradsafe.models.layout import Layout
from gradsafe.models.linear import linear_shape, without_adapters

Role = Literal["attention", "mlp"]
# How x and dy are reached: the module is called, its weight is used in a product elsewhere, or the
# module is a set of fused experts behind transformers' interface.
Use = Literal["call", "product", "experts"]

UNUSED = "takes no part in a pass over text"


@dataclass(frozen=True)
class LinearLayer:
    """One scored weight, or one stack of expert matrices.

    Attributes:
        name: Qualified name of the module, and of the parameter where the module holds others.
        module: The linear-like module; for LoRA the wrapper, whose output includes the adapter's;
            for a bare parameter its owner.
        block: Index of its decoder block.
        role: "attention" inside an attention module, else "mlp".
        out_features: O; the weight gradient is `[O, I]` (also for `Conv1D`, which stores `[I, O]`).
        in_features: I.
        experts: E of a stack `[E, O, I]` (also where `[E, I, O]` is stored), 0 for a plain matrix.
        parameter: Name of the weight in its module.
        use: "call" of the module, "product" with the weight, or "experts" behind transformers'
            interface.
        transposed: Whether a bare parameter stores I before O.
        layout: Where samples and tokens lie in its input; None where a row's sample is only known
            in a batch of one sample.
        around: Module around `module`.
        twins: Other modules with the same weight; their gradients add up.
    """

    name: str
    module: nn.Module
    block: int
    role: Role
    out_features: int
    in_features: int
    experts: int = 0
    parameter: str = "weight"
    use: Use = "call"
    transposed: bool = False
    layout: Layout | None = field(default_factory=Layout)
    around: nn.Module | None = None
    twins: tuple[nn.Module, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of weight entries."""
        return max(1, self.experts) * self.out_features * self.in_features


@dataclass
class Candidate:
    """A weight that may be scored, and what a pass over text shows of it.

    Attributes:
        name: Qualified name of the module, and of the parameter where the module holds others.
        module: Owner of the weight.
        around: Module around it.
        parameter: Name of the weight in its module.
        block: Index of the decoder block.
        role: "attention" inside an attention module, else "mlp".
        listed: Path of the list of modules inside the block that holds it, "" without one.
        twins: Other linear modules with the same weight; their gradients add up.
        use: How its x and dy are reached; None where it cannot be scored.
        reason: Why not.
        shape: (E, O, I); E is 0 for a plain matrix.
        transposed: Whether a product's weight stores `[I, O]`.
        layout: As in `LinearLayer`.
        reached: Whether a backward pass reached its output.
    """

    name: str
    module: nn.Module
    around: nn.Module
    parameter: str
    block: int
    role: Role
    listed: str
    twins: list[nn.Module] = field(default_factory=list)
    use: Use | None = None
    reason: str = UNUSED
    shape: tuple[int, int, int] = (0, 0, 0)
    transposed: bool = False
    layout: Layout | None = None
    reached: bool = False

    @property
    def scored(self) -> LinearLayer:
        """The layer, where `use` is not None."""
        experts, out_features, in_features = self.shape
        assert self.use is not None
        return LinearLayer(
            self.name, self.module, self.block, self.role, out_features, in_features, experts,
            self.parameter, self.use, self.transposed, self.layout, self.around, tuple(self.twins),
        )  # fmt: skip

    def accept(
        self, use: Use, shape: tuple[int, int, int], transposed: bool, layout: Layout | None
    ) -> None:
        """It can be scored this way."""
        self.use, self.reason = use, ""
        self.shape, self.transposed, self.layout = shape, transposed, layout

    def refuse(self, reason: str) -> None:
        """It cannot be scored."""
        self.use, self.reason = None, reason


def find_candidates(blocks: nn.ModuleList, prefix: str) -> list[Candidate]:
    """List the weights of all blocks, first block first; a shared weight is listed once.

    `prefix` is the qualified name of the list of blocks.
    """
    found: list[Candidate] = []
    modules: set[int] = set()
    owners: dict[int, Candidate] = {}  # by id of the weight
    for index, block in enumerate(blocks):
        start = f"{prefix}.{index}"
        parents: dict[str, nn.Module] = {prefix: blocks}
        for path, module in without_adapters(block, start):
            parents[path] = module
            if id(module) in modules:
                continue
            modules.add(id(module))
            around, place = parents[path.rpartition(".")[0]], _place(block, path, start)
            for leaf, name in _weights(module, path):
                weight = module._parameters.get(leaf)
                if weight is not None and id(weight) in owners:
                    owners[id(weight)].twins.append(module)
                    continue
                found.append(Candidate(name, module, around, leaf, index, *place))
                if weight is not None:
                    owners[id(weight)] = found[-1]
    return found


def _weights(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """Parameter name and full name of the weights that belong to this module itself."""
    if linear_shape(module) is not None:
        yield "weight", path
        return
    elementwise = isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd))
    if elementwise or "norm" in type(module).__name__.lower():
        return
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.ndim in (2, 3) and parameter.is_floating_point():
            # A single weight has the name of its module.
            yield leaf, path if leaf == "weight" else f"{path}.{leaf}"


def _place(block: nn.Module, path: str, start: str) -> tuple[Role, str]:
    """Role of a module, and the innermost list of modules that holds it."""
    module, walked, listed = block, start, ""
    role: Role = "mlp"
    for part in path.removeprefix(start).strip(".").split("."):
        if isinstance(module, nn.ModuleList):
            listed = walked
        kind = type(module).__name__.lower()
        if module is not block and ("attention" in kind or "attn" in kind):
            role = "attention"
        if part:
            module, walked = module.get_submodule(part), f"{walked}.{part}"
    return role, listed

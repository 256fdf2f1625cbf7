"""Which weights are scored: linear layers, chosen by module type and place in the decoder."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from gradsafe.models.coverage import Skipped, skipped_parameters
from gradsafe.models.decoder import decoder_blocks, head_dimension
from gradsafe.models.linear import linear_shape, topmost_linears

Role = Literal["attention", "mlp"]


@dataclass(frozen=True)
class LinearLayer:
    """One scored weight.

    Attributes:
        name: Qualified name of the module in the model.
        module: The linear-like module; for LoRA the wrapper, whose output the adapter is part of.
        block: Index of its decoder block.
        role: "attention" inside an attention module, else "mlp".
        out_features: O; the weight gradient is `[O, I]` (also for `Conv1D`, which stores `[I, O]`).
        in_features: I.
    """

    name: str
    module: nn.Module
    block: int
    role: Role
    out_features: int
    in_features: int


@dataclass
class Layers:
    """The scored weights of a model, and everything that was left out.

    Attributes:
        scored: Scored layers, first block first.
        skipped: Parameters that are not scored, grouped by place and reason.
        blocks: All decoder blocks.
        head_dim: Size of an attention head, None where unknown.
    """

    scored: list[LinearLayer]
    skipped: list[Skipped]
    blocks: nn.ModuleList
    head_dim: int | None

    @property
    def scored_parameters(self) -> int:
        """Number of scored weight entries."""
        return sum(layer.out_features * layer.in_features for layer in self.scored)

    @property
    def total_parameters(self) -> int:
        """Number of all parameters, scored or not; tied ones count once."""
        return self.scored_parameters + sum(entry.parameters for entry in self.skipped)

    def __str__(self) -> str:
        blocks = len({layer.block for layer in self.scored})
        total = self.total_parameters
        reasons: dict[str, int] = {}
        for entry in self.skipped:
            reasons[entry.reason] = reasons.get(entry.reason, 0) + entry.parameters
        skipped = ", ".join(
            f"{reason} {_short(count)}"
            for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
        )
        return (
            f"scored {len(self.scored)} weights in {blocks} block{'s' if blocks != 1 else ''}: "
            f"{_short(self.scored_parameters)} of {_short(total)} parameters "
            f"({100 * self.scored_parameters / total:.0f} %); skipped: {skipped or 'nothing'}"
        )


def find_layers(
    model: nn.Module,
    layers: int | Sequence[int] | None = None,
    modules: Literal["all", "attention", "mlp"] = "all",
) -> Layers:
    """Choose the weights to score.

    Args:
        model: A causal language model, PEFT wrapper or not.
        layers: None for all blocks, n for the last n blocks, or block indices (negative ones count
            from the end).
        modules: Attention projections, MLP projections, or both.

    Returns:
        The scored layers and the list of what was left out.

    Raises:
        TypeError: `layers` holds something else than integers.
        ValueError: `layers` is out of range, `modules` is unknown, or no supported layer is there.
    """
    if modules not in ("all", "attention", "mlp"):
        raise ValueError(
            f'gradsafe.find_layers: expected modules="all", "attention" or "mlp", got {modules!r}'
        )
    blocks = decoder_blocks(model)
    chosen = _block_indices(layers, len(blocks))
    names = {id(module): name for name, module in model.named_modules()}
    candidates: list[LinearLayer] = []
    for index, block in enumerate(blocks):
        for name, module in topmost_linears(block):
            shape = linear_shape(module)
            assert shape is not None
            full_name = f"{names[id(block)]}.{name}" if name else names[id(block)]
            candidates.append(LinearLayer(full_name, module, index, _role(block, name), *shape))
    scored = [
        layer
        for layer in candidates
        if layer.block in chosen and (modules == "all" or layer.role == modules)
    ]
    if not scored:
        types = sorted({type(m).__name__ for i in chosen for m in blocks[i].modules()})
        raise ValueError(
            f"gradsafe.find_layers: no supported linear layer among blocks {sorted(chosen)} of "
            f"{type(model).__name__} with modules={modules!r}; {len(candidates)} in all blocks; "
            f"module types found there: {', '.join(types)}"
        )
    skipped = skipped_parameters(model, blocks, chosen, [layer.module for layer in scored])
    return Layers(scored, skipped, blocks, head_dimension(model))


def _block_indices(layers: int | Sequence[int] | None, depth: int) -> set[int]:
    if layers is None:
        return set(range(depth))
    if isinstance(layers, (bool, str)):
        raise TypeError(
            f"gradsafe.find_layers: expected layers to be an int, a sequence of ints or None, "
            f"got {layers!r}"
        )
    if not isinstance(layers, Sequence):
        count = operator.index(layers)
        if not 1 <= count <= depth:
            raise ValueError(
                f"gradsafe.find_layers: expected layers=n with 1 <= n <= {depth} (the last n "
                f"blocks), got {count}; for one certain block pass a list, layers=[{count}]"
            )
        return set(range(depth - count, depth))
    indices = [operator.index(index) for index in layers]
    if not indices:
        raise ValueError("gradsafe.find_layers: layers is an empty sequence; pass None for all")
    for index in indices:
        if not -depth <= index < depth:
            raise ValueError(
                f"gradsafe.find_layers: block index {index} is out of range; the model has "
                f"{depth} blocks, so pass {-depth} to {depth - 1}"
            )
    return {index % depth for index in indices}


def _role(block: nn.Module, name: str) -> Role:
    module = block
    for part in name.split(".")[:-1]:
        module = module.get_submodule(part)
        kind = type(module).__name__.lower()
        if "attention" in kind or "attn" in kind:
            return "attention"
    return "mlp"


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)

"""Which weights are scored: linear layers, chosen by module type and place in the decoder."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from gradsafe.models.candidates import Role, Use, find_candidates
from gradsafe.models.coverage import Skipped, skipped_parameters
from gradsafe.models.decoder import decoder_blocks, head_dimension
from gradsafe.models.layout import Layout
from gradsafe.models.probe import observe


@dataclass(frozen=True)
class LinearLayer:
    """One scored weight, or one stack of expert matrices.

    Attributes:
        name: Qualified name of the module, and of the parameter where the module holds others.
        module: The linear-like module; for LoRA the wrapper, whose output the adapter is part of;
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
            when it is alone.
        around: Module around `module`.
        twins: Other modules with the same weight; what they do adds up.
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
class Layers:
    """The scored weights of a model, and everything that was left out.

    Attributes:
        scored: Scored layers, first block first.
        skipped: Parameters that are not scored, grouped by place and reason.
        blocks: All decoder blocks.
        head_dim: Size of an attention head, None where unknown.
        block_parameters: Number of all parameters of the chosen blocks.
        padding: Whether a sample's logits are the same with padding behind it.
    """

    scored: list[LinearLayer]
    skipped: list[Skipped]
    blocks: nn.ModuleList
    head_dim: int | None
    block_parameters: int = 0
    padding: bool = True

    @property
    def one_at_a_time(self) -> bool:
        """Whether a sample's gradients are only right while no other is in the batch."""
        return not self.padding or any(layer.layout is None for layer in self.scored)

    @property
    def scored_parameters(self) -> int:
        """Number of scored weight entries."""
        return sum(layer.parameters for layer in self.scored)

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

    One forward pass over a few tokens shows how the weights are used: which take part, and where
    samples and tokens lie in their inputs.

    Args:
        model: A causal language model, PEFT wrapper or not.
        layers: None for all blocks, n for the last n blocks, or block indices (negative ones count
            from the end).
        modules: Attention projections, MLP projections, or both.

    Returns:
        The scored layers and the list of what was left out.

    Raises:
        TypeError: `layers` holds something else than integers.
        ValueError: `layers` is out of range, `modules` is unknown, the model cannot read text, or
            no supported layer is there.
    """
    if modules not in ("all", "attention", "mlp"):
        raise ValueError(
            f'gradsafe.find_layers: expected modules="all", "attention" or "mlp", got {modules!r}'
        )
    blocks = decoder_blocks(model)
    chosen = _block_indices(layers, len(blocks))
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    candidates = find_candidates(blocks, prefix)
    usages, padding = observe(model, candidates)
    usable = [
        LinearLayer(
            name=c.name,
            module=c.module,
            block=c.block,
            role=c.role,
            out_features=usages[c.name].shape[1],
            in_features=usages[c.name].shape[2],
            experts=usages[c.name].shape[0],
            parameter=c.parameter,
            use=use,
            transposed=usages[c.name].transposed,
            layout=usages[c.name].layout,
            around=c.around,
            twins=tuple(c.twins),
        )
        for c in candidates
        if (use := usages[c.name].use) is not None
    ]
    scored = [
        layer
        for layer in usable
        if layer.block in chosen and (modules == "all" or layer.role == modules)
    ]
    if not scored:
        types = sorted({type(m).__name__ for i in chosen for m in blocks[i].modules()})
        raise ValueError(
            f"gradsafe.find_layers: no supported linear layer among blocks {sorted(chosen)} of "
            f"{type(model).__name__} with modules={modules!r}; {len(usable)} in all blocks; "
            f"module types found there: {', '.join(types)}"
        )
    reasons = {(id(c.module), c.parameter): usages[c.name].reason for c in candidates}
    reasons |= {(id(x.module), x.parameter): "not in the chosen modules" for x in usable}
    scored_weights = [(layer.module, layer.parameter) for layer in scored]
    skipped = skipped_parameters(model, blocks, chosen, scored_weights, reasons)
    inside = {id(p): p.numel() for i in chosen for p in blocks[i].parameters()}
    return Layers(scored, skipped, blocks, head_dimension(model), sum(inside.values()), padding)


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


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)

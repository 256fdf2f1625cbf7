"""Which weights are scored: linear layers, chosen by module type and place in the decoder."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from gradsafe._checks import refuse
from gradsafe.models.candidates import LinearLayer, find_candidates
from gradsafe.models.coverage import Skipped, skipped_parameters
from gradsafe.models.decoder import decoder_blocks, head_dimension
from gradsafe.models.probe import observe


@dataclass
class Layers:
    """The scored weights of a model, and everything that was left out.

    Attributes:
        scored: Scored layers, first block first.
        skipped: Parameters that are not scored, grouped by place and reason.
        blocks: All decoder blocks.
        head_dim: Size of an attention head, None where unknown.
        block_parameters: Number of all parameters of the chosen blocks.
        padding: Whether padding behind a sample leaves its logits unchanged.
        continues: Whether texts behind the keys and values of an opening have the logits of whole
            texts.
    """

    scored: list[LinearLayer]
    skipped: list[Skipped]
    blocks: nn.ModuleList
    head_dim: int | None
    block_parameters: int = 0
    padding: bool = True
    continues: bool = False

    @property
    def one_at_a_time(self) -> bool:
        """Whether gradients are only right in a batch of one sample."""
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
        reasons: Counter[str] = Counter()
        for entry in self.skipped:
            reasons[entry.reason] += entry.parameters
        skipped = ", ".join(f"{name} {_short(count)}" for name, count in reasons.most_common())
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
            no supported layer is found.
    """
    if modules not in ("all", "attention", "mlp"):
        refuse("find_layers", 'modules="all", "attention" or "mlp"', repr(modules))
    blocks = decoder_blocks(model)
    chosen = _block_indices(layers, len(blocks))
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    candidates = find_candidates(blocks, prefix)
    facts = observe(model, candidates)
    usable = [c.scored for c in candidates if c.use is not None]
    scored = [x for x in usable if x.block in chosen and modules in ("all", x.role)]
    if not scored:
        types = sorted({type(m).__name__ for i in chosen for m in blocks[i].modules()})
        raise ValueError(
            f"gradsafe.find_layers: no supported linear layer among blocks {sorted(chosen)} of "
            f"{type(model).__name__} with modules={modules!r}; {len(usable)} in all blocks; "
            f"module types found there: {', '.join(types)}"
        )
    reasons = {(id(c.module), c.parameter): c.reason for c in candidates}
    reasons |= {(id(x.module), x.parameter): "not in the chosen modules" for x in usable}
    weights = {(id(layer.module), layer.parameter) for layer in scored}
    skipped = skipped_parameters(model, blocks, chosen, weights, reasons)
    inside = {id(p): p.numel() for i in chosen for p in blocks[i].parameters()}
    return Layers(scored, skipped, blocks, head_dimension(model), sum(inside.values()), *facts)


def _block_indices(layers: int | Sequence[int] | None, depth: int) -> set[int]:
    if layers is None:
        return set(range(depth))
    if isinstance(layers, (bool, str)):
        expected = "layers to be an int, a sequence of ints or None"
        refuse("find_layers", expected, repr(layers), kind=TypeError)
    if not isinstance(layers, Sequence):
        count = operator.index(layers)
        if not 1 <= count <= depth:
            expected = f"layers=n with 1 <= n <= {depth} (the last n blocks)"
            refuse("find_layers", expected, count, f"for one block pass a list, layers=[{count}]")
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

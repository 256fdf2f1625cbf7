"""Which rows of the weights are scored, which entries form one component, and their sums.

A component is a union of slices of weight gradients. Sums over slices are additive, so every
granularity fills the same table: each slice that `ops.moments` reports is added to the row of its
component.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gradsafe.detection.config import Granularity
from gradsafe.models import Layers, LinearLayer
from gradsafe.ops import Axis, Moments
from gradsafe.ops.moments import standard_deviation as from_sums

COUNT, SUM, SUM_SQ, DOTS = 0, 1, 2, 3  # columns of a table; the K dots come last

# Layer name to the rows that are scored, [R] int64 in ascending order; empty for all rows.
Rows = dict[str, Tensor]
# Axis along which a layer is read, and the component of each slice [slices] int64: rows before
# columns for axis "both", a stack of experts expert by expert.
Slices = tuple[Axis, Tensor]


def choose_rows(layers: Layers, fraction: float, seed: int) -> Rows:
    """Choose the rows of every weight that are scored; the same on every machine.

    The O rows of a weight are divided into ceil(fraction * O) strata of nearly equal size, and one
    row is drawn from each: every attention head keeps its share, and the variance between draws is
    lower than without strata. The experts of a stack `[E, O, I]` keep the same rows.
    """
    if fraction == 1:
        return {}
    generator = torch.Generator().manual_seed(seed)
    rows: Rows = {}
    for layer in layers.scored:
        kept = math.ceil(fraction * layer.out_features)
        edges = torch.arange(kept + 1) * layer.out_features // kept
        widths = edges[1:] - edges[:-1]
        draw = torch.rand(kept, generator=generator, dtype=torch.float64)
        rows[layer.name] = edges[:-1] + (draw * widths).long().clamp(max=widths - 1)
    return rows


class ComponentMap:
    """The C = `size` components of a model; `components[layer]` gives a layer's `Slices`.

    Of the layers named in `output_projections`, the input, not the output, is divided into heads.
    """

    def __init__(
        self,
        layers: Layers,
        granularity: Granularity,
        output_projections: Collection[str],
        rows: Rows,
    ) -> None:
        self.size = 0
        self._head_dim = layers.head_dim
        self._granularity, self._rows = granularity, rows
        self._output_projections = output_projections
        self._labels: list[tuple[str, str, Sequence[int]]] = []  # (owner, kind, numbers)
        self._blocks: dict[int, Tensor] = {}  # component of each block, granularity "layer"
        self._slices = {layer.name: self._slices_of(layer) for layer in layers.scored}

    def __getitem__(self, layer: LinearLayer) -> Slices:
        return self._slices[layer.name]

    def by_name(self, name: str) -> Slices:
        """The `Slices` of the layer with this name."""
        return self._slices[name]

    @property
    def names(self) -> list[str]:
        """Name of every component, in column order."""
        return [
            f"{owner}[{kind} {number}]" if kind else owner
            for owner, kind, numbers in self._labels
            for number in numbers
        ]

    def _add(self, owner: str, kind: str = "", numbers: Sequence[int] = (0,)) -> Tensor:
        """Appends components and returns their columns."""
        self._labels.append((owner, kind, numbers))
        self.size += len(numbers)
        return torch.arange(self.size - len(numbers), self.size)

    def _slices_of(self, layer: LinearLayer) -> Slices:
        kind, name, stack = self._granularity, layer.name, max(1, layer.experts)
        kept, columns = self._rows.get(name), range(layer.in_features)
        rows: Sequence[int] = range(layer.out_features) if kept is None else kept.tolist()
        if kind == "expert" and layer.experts:
            return "tensor", self._add(name, "expert", range(stack))
        if kind in ("row", "column", "row+column"):
            parts = []
            if kind != "column":
                if layer.experts:  # a stack [E, O, I] is numbered as one matrix [E * O, I]
                    rows = [e * layer.out_features + row for e in range(stack) for row in rows]
                parts.append(self._add(name, "row", rows).view(stack, -1))
            if kind != "row":
                parts.append(self._add(name, "column", columns).expand(stack, -1))
            return "both" if kind == "row+column" else kind, torch.cat(parts, dim=1).flatten()
        if kind == "head" and layer.role == "attention" and self._head_dim and not layer.experts:
            by_input = name in self._output_projections
            split = layer.in_features if by_input else layer.out_features
            if split % self._head_dim == 0:
                heads = self._add(name, "head", range(split // self._head_dim))
                which = torch.tensor(columns if by_input else rows) // self._head_dim
                return "column" if by_input else "row", heads[which]
        if kind == "layer":
            if layer.block not in self._blocks:
                self._blocks[layer.block] = self._add(f"block {layer.block}")
            return "tensor", self._blocks[layer.block].expand(stack)
        return "tensor", self._add(name).expand(stack)


def slice_values(result: Moments | tuple[Moments, Moments]) -> Tensor:
    """Moments of n gradients as `[n, slices, 3 + K]` float64; rows before columns for a pair."""
    tables = []
    for part in result if isinstance(result, tuple) else (result,):
        count, total, total_sq, dots = (
            torch.stack(field) if isinstance(field, list) else field
            for field in (part.count, part.sum, part.sum_sq, part.dots)
        )
        fields = [count, total, total_sq, *dots.unbind(1)]
        tables.append(torch.stack([f.reshape(len(count), -1) for f in fields], dim=2))
    return torch.cat(tables, dim=1)


def standard_deviation(table: Tensor) -> Tensor:
    """Population standard deviation of the components of a table `[..., 3 + K]`; 0 if empty."""
    return from_sums(table[..., COUNT], table[..., SUM], table[..., SUM_SQ])

"""Components: which entries of the weight gradients share one score, and their sums.

A component is a union of slices of weight gradients. Sums over slices add up, so every granularity
is the same table: each slice that `ops.moments` reports is added to the row of its component.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.detection.config import Granularity
from gradsafe.detection.rows import Rows
from gradsafe.models import Layers, LinearLayer
from gradsafe.ops import Axis, Moments
from gradsafe.ops.moments import standard_deviation as from_sums

COUNT, SUM, SUM_SQ, DOTS = 0, 1, 2, 3  # columns of a table; the K dots come last


@dataclass(frozen=True)
class Slices:
    """How one layer's slices map to components: axis of the read, component of each slice."""

    axis: Axis
    # [slices] int64; rows before columns for axis "both"; those of a stack expert by expert.
    components: Tensor


class ComponentMap:
    """The components of a model at one granularity.

    Args:
        layers: The scored layers.
        granularity: See `DetectorConfig`.
        output_projections: Names of the layers whose input, not output, is split into heads.
        rows: Rows that are kept of each weight, see `choose_rows`; None or empty for all. Every
            expert of a stack keeps the same.

    Attributes:
        size: Number of components C.
    """

    def __init__(
        self,
        layers: Layers,
        granularity: Granularity,
        output_projections: Collection[str] = (),
        rows: Rows | None = None,
    ) -> None:
        self.layers = layers
        self.granularity = granularity
        self.output_projections = frozenset(output_projections)
        self.rows: Rows = rows or {}
        self._slices: dict[str, Slices] = {}
        self._labels: list[tuple[str, str, Sequence[int]]] = []  # (owner, kind, numbers)
        self.size = 0
        blocks: dict[int, int] = {}
        for layer in layers.scored:
            if granularity == "layer":
                if layer.block not in blocks:
                    blocks[layer.block] = self._add(f"block {layer.block}")
                self._slices[layer.name] = self._whole(layer, blocks[layer.block])
            else:
                self._slices[layer.name] = self._slices_of(layer)

    def __getitem__(self, layer: LinearLayer) -> Slices:
        return self._slices[layer.name]

    @property
    def names(self) -> list[str]:
        """Name of every component, in column order."""
        names: list[str] = []
        for owner, kind, numbers in self._labels:
            names += [f"{owner}[{kind} {i}]" for i in numbers] if kind else [owner]
        return names

    def owner(self, component: int) -> str:
        """Name of the weight, or block, that a component belongs to."""
        for owner, _, numbers in self._labels:
            if component < len(numbers):
                return owner
            component -= len(numbers)
        raise IndexError(component)

    def add(self, table: Tensor, layer: LinearLayer, values: Tensor) -> None:
        """Add one layer's slices to a table.

        Args:
            table: `[B, C, 3 + K]` float64, changed in place.
            layer: The layer.
            values: `[B, slices, 3 + K]` float64, see `slice_values`.
        """
        table.index_add_(1, self[layer].components, values)

    def _add(self, owner: str, kind: str = "", numbers: Sequence[int] = (0,)) -> int:
        first = self.size
        self._labels.append((owner, kind, numbers))
        self.size += len(numbers)
        return first

    def _slices_of(self, layer: LinearLayer) -> Slices:
        if layer.experts:
            return self._slices_of_stack(layer)
        rows, cols = self._row_numbers(layer), range(layer.in_features)
        if self.granularity == "row":
            return Slices("row", self._each(layer, "row", rows))
        if self.granularity == "column":
            return Slices("column", self._each(layer, "column", cols))
        if self.granularity == "row+column":
            parts = [self._each(layer, "row", rows), self._each(layer, "column", cols)]
            return Slices("both", torch.cat(parts))
        if self.granularity == "head" and layer.role == "attention" and self.layers.head_dim:
            by_input = layer.name in self.output_projections
            split = layer.in_features if by_input else layer.out_features
            head = self.layers.head_dim
            if split % head == 0:
                heads = self._each(layer, "head", range(split // head))
                which = torch.tensor(cols if by_input else rows) // head
                return Slices("column" if by_input else "row", heads[which])
        return self._whole(layer, self._add(layer.name))

    def _slices_of_stack(self, layer: LinearLayer) -> Slices:
        """A stack `[E, O, I]` is read as one matrix `[E * O, I]`, or expert by expert."""
        kind, experts = self.granularity, range(layer.experts)
        if kind == "expert":
            return Slices("tensor", self._each(layer, "expert", experts))
        if kind not in ("row", "column", "row+column"):
            return self._whole(layer, self._add(layer.name))
        parts = []
        if kind != "column":
            kept = self._row_numbers(layer)
            numbers = [e * layer.out_features + row for e in experts for row in kept]
            parts.append(self._each(layer, "row", numbers).view(layer.experts, -1))
        if kind != "row":
            columns = self._each(layer, "column", range(layer.in_features))
            parts.append(columns.expand(layer.experts, -1))
        axis: Axis = "both" if kind == "row+column" else kind
        return Slices(axis, torch.cat(parts, dim=1).flatten())

    def _whole(self, layer: LinearLayer, component: int) -> Slices:
        return Slices("tensor", torch.full((max(1, layer.experts),), component))

    def _row_numbers(self, layer: LinearLayer) -> Sequence[int]:
        kept = self.rows.get(layer.name)
        return range(layer.out_features) if kept is None else kept.tolist()

    def _each(self, layer: LinearLayer, kind: str, numbers: Sequence[int]) -> Tensor:
        first = self._add(layer.name, kind, numbers)
        return torch.arange(first, first + len(numbers))


def slice_values(result: Moments | tuple[Moments, Moments]) -> Tensor:
    """Moments of n gradients as `[n, slices, 3 + K]` float64; rows before columns for a pair."""
    parts: Sequence[Moments] = result if isinstance(result, tuple) else (result,)
    tables = []
    for part in parts:
        count, total, total_sq, dots = (
            torch.stack(field) if isinstance(field, list) else field
            for field in (part.count, part.sum, part.sum_sq, part.dots)
        )
        fields = [count, total, total_sq, *dots.unbind(1)]
        tables.append(torch.stack([f.reshape(len(count), -1) for f in fields], dim=2))
    return tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)


def standard_deviation(table: Tensor) -> Tensor:
    """Population standard deviation of every component.

    Args:
        table: `[..., 3 + K]` float64.

    Returns:
        `[...]` float64; 0 for a component without entries.
    """
    return from_sums(table[..., COUNT], table[..., SUM], table[..., SUM_SQ])

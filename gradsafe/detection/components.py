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
    components: Tensor  # [slices] int64; rows before columns for axis "both"


class ComponentMap:
    """The components of a model at one granularity.

    Args:
        layers: The scored layers.
        granularity: See `DetectorConfig`.
        output_projections: Names of the layers whose input, not output, is split into heads.
        rows: Rows that are kept of each weight, see `choose_rows`; None or empty for all.

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
                self._slices[layer.name] = Slices("tensor", torch.tensor([blocks[layer.block]]))
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
        kept = self.rows.get(layer.name)
        rows = range(layer.out_features) if kept is None else kept.tolist()
        cols = range(layer.in_features)
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
        return Slices("tensor", torch.tensor([self._add(layer.name)]))

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

"""Seeded choice of the rows of every weight that are scored (`row_fraction`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradsafe.models import Layers

# Layer name to the rows that are kept, [R] int64 in ascending order.
Rows = dict[str, Tensor]


def choose_rows(layers: Layers, fraction: float, seed: int) -> Rows:
    """Choose the rows of every scored weight that are scored.

    The O rows of a weight are divided into ceil(fraction * O) strata of nearly equal size, and one
    row is drawn from each: every attention head keeps its share, and the variance between draws is
    lower than without strata. The experts of a stack `[E, O, I]` keep the same rows.

    Args:
        layers: The scored layers.
        fraction: Part to keep, above 0 and at most 1.
        seed: Of the draw; the same seed, layers and fraction give the same rows on every machine.

    Returns:
        The rows of each layer; empty if all are kept.
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

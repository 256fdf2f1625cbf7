"""The calls of one layer in one pass, merged to one x and one dy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.models.candidates import LinearLayer
from gradsafe.models.experts import Routing


@dataclass
class Part:
    """x and dy of one call of a layer."""

    layer: LinearLayer
    x: Tensor
    dy: Tensor
    shape: tuple[int, int]
    routing: Routing | None


def merge(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """`[B, rows, F]` of all calls; where rows are tokens, the calls of one token are neighbours."""
    width = parts[0].shape[1]
    by_token = parts[0].layer.layout is not None and parts[0].layer.layout.time is not None
    pairs = []
    for part in parts:
        layout, samples = part.layer.layout, part.shape[0]
        assert layout is not None
        x = part.x.to(device=part.dy.device, dtype=part.dy.dtype)
        pairs.append((layout.rows(x, samples), layout.rows(part.dy, samples)))
    parts.clear()
    if len(pairs) == 1:
        return pairs[0]
    if by_token:
        pairs = [(x.unflatten(1, (width, -1)), dy.unflatten(1, (width, -1))) for x, dy in pairs]
        x, dy = (torch.cat(values, 2).flatten(1, 2) for values in zip(*pairs, strict=True))
    else:
        x, dy = (torch.cat(values, 1) for values in zip(*pairs, strict=True))
    return x, dy


def merge_stack(parts: list[Part]) -> tuple[Tensor, Tensor, Routing]:
    """`[N, F]` of all calls, sorted by expert, then token."""
    routings = [part.routing for part in parts if part.routing is not None]
    pairs = [(part.x.to(part.dy).flatten(0, -2), part.dy.flatten(0, -2)) for part in parts]
    parts.clear()
    if len(pairs) == 1:
        return *pairs[0], routings[0]
    x, dy = (torch.cat(values) for values in zip(*pairs, strict=True))
    experts = torch.cat([routing.experts for routing in routings])
    tokens = [routing.tokens for routing in routings if routing.tokens is not None]
    samples, width = routings[0].samples, routings[0].width
    if len(tokens) == len(routings):
        where = torch.cat(tokens)
        order = torch.argsort(experts * (samples * width) + where, stable=True)
        return x[order], dy[order], Routing(where[order], experts[order], samples, width)
    order = torch.argsort(experts, stable=True)
    return x[order], dy[order], Routing(None, experts[order], samples, width)

"""The operators as the GPU suite sees them: inputs, a call, the float64 oracle of its results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradsafe import reference
from gradsafe.ops import Moments, grouped_wgrad_moments, moments, wgrad_moments

Result = Moments | tuple[Moments, Moments]


def flat(result: Result) -> list[Tensor]:
    """All tensors of a result, in a fixed order."""
    parts = result if isinstance(result, tuple) else (result,)
    return [t for m in parts for f in (m.count, m.sum, m.sum_sq, m.dots) for t in f]


@dataclass(frozen=True)
class Operator:
    """One operator. A further one joins by one entry in OPERATORS.

    Attributes:
        make: device to arguments.
        call: arguments and axis to a result.
        oracle: the same in float64 on the CPU, from arguments on the CPU.
        terms: sums of absolute values of what is summed: the scale of the rounding error.
        name: name in the dispatcher.
    """

    name: str
    make: Callable[[str], tuple[Any, ...]]
    call: Callable[..., Result]
    oracle: Callable[..., Result]
    terms: Callable[..., Result]


def _make_moments(device: str, ref_dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    shapes = [(513, 2049), (64, 128), (7, 5), (1, 70_000)]
    grads = [torch.randn(s).bfloat16() for s in shapes]
    refs = [[torch.randn(s).to(ref_dtype) for _ in range(2)] for s in shapes]
    return [g.to(device) for g in grads], [[r.to(device) for r in group] for group in refs]


def _make_wgrad(device: str, ref_dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    x, dy = torch.randn(3, 50, 390).bfloat16(), torch.randn(3, 50, 260).bfloat16()
    refs = [torch.randn(260, 390).to(ref_dtype) for _ in range(2)]
    return x.to(device), dy.to(device), [r.to(device) for r in refs]


# Tokens of (sample, expert), sorted by sample; nothing reaches expert 3.
SEGMENTS = [5, 1, 0, 40, 7, 2, 33, 4], [0, 2, 4, 1, 4, 0, 1, 4]


def _make_grouped(
    device: str, shape: tuple[int, int], ref_dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, ...]:
    rows = sum(SEGMENTS[0])
    x, dy = torch.randn(rows, shape[1]).bfloat16(), torch.randn(rows, shape[0]).bfloat16()
    refs = [torch.randn(5, *shape).to(ref_dtype) for _ in range(2)]
    return x.to(device), dy.to(device), [r.to(device) for r in refs]


def _grouped(shape: tuple[int, int]) -> Operator:
    return Operator(
        "grouped_wgrad_moments",
        functools.partial(_make_grouped, shape=shape),
        lambda x, dy, r, axis: grouped_wgrad_moments(x, dy, r, *SEGMENTS, axis),
        lambda x, dy, r, axis: reference.grouped_wgrad_moments(x, dy, r, *SEGMENTS, axis),
        lambda x, dy, r, axis: reference.grouped_wgrad_moments(
            x.abs(), dy.abs(), [t.float().abs() for t in r], *SEGMENTS, axis
        ),
    )


OPERATORS = [
    Operator(
        "moments",
        _make_moments,
        lambda g, r, axis: moments(g, r, axis),
        lambda g, r, axis: reference.moments(g, r, axis),
        lambda g, r, axis: reference.moments(
            [t.abs() for t in g], [[t.float().abs() for t in group] for group in r], axis
        ),
    ),
    Operator(
        "wgrad_moments",
        _make_wgrad,
        lambda x, dy, r, axis: wgrad_moments(x, dy, r, axis, lengths=[50, 17, 1]),
        lambda x, dy, r, axis: reference.wgrad_moments(x, dy, r, axis, lengths=[50, 17, 1]),
        lambda x, dy, r, axis: reference.wgrad_moments(
            x.abs(), dy.abs(), [t.float().abs() for t in r], axis, lengths=[50, 17, 1]
        ),
    ),
    _grouped((256, 384)),  # rows and matrices on 16-byte borders
    _grouped((261, 391)),  # none of them
]
OPERATORS += [
    replace(operator, make=functools.partial(operator.make, ref_dtype=torch.float8_e4m3fn))
    for operator in list(OPERATORS)
]


def registered(operator: Operator) -> bool:
    """Whether the build holds the operator's CUDA kernel."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"gradsafe::{operator.name}", "CUDA")
    )


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies `change` to every tensor of nested lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, change) for v in value)
    return value

"""The operators as the GPU suite sees them: inputs, a call, the float64 oracle of its results."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsafe.ops import Moments, grouped_wgrad_moments, moments, wgrad_moments
from gradsafe.ops import _default as reference

Result = Moments | tuple[Moments, Moments]


def flat(result: Result) -> list[Tensor]:
    """All tensors of a result, in a fixed order."""
    parts = result if isinstance(result, tuple) else (result,)
    return [t for m in parts for f in (m.count, m.sum, m.sum_sq, m.dots) for t in f]


@dataclass(frozen=True)
class Operator:
    """One operator on one kind of input.

    Attributes:
        label: of the kind of input.
        make: device to arguments.
        call: arguments and axis to a result.
        oracle: the same in float64, on the arguments' device.
        terms: sums of absolute values of what is summed: the scale of the rounding error.
        name: name in the dispatcher.
    """

    name: str
    label: str
    make: Callable[[str], tuple[Any, ...]]
    call: Callable[..., Result]
    oracle: Callable[..., Result]
    terms: Callable[..., Result]


F32, BF16, F16, F8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
LENGTHS = [50, 17, 1]
# Tokens of (sample, expert), sorted by sample; nothing reaches expert 3.
SEGMENTS = [5, 1, 0, 40, 7, 2, 33, 4], [0, 2, 4, 1, 4, 0, 1, 4]
EXPERTS = 5
# Rows of a multiple of 16 bytes in every dtype, or of none: copies of 16 bytes, or single loads.
# Neither ends with a whole tile.
MATRICES = {True: [(257, 2064), (64, 128), (1, 65_552)], False: [(257, 2051), (7, 5), (3, 70_001)]}
FEATURES = {True: (400, 272), False: (390, 261)}


def _randn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _make_moments(
    device: str, dtype: torch.dtype, ref_dtype: torch.dtype, refs: int, aligned: bool
) -> tuple[Any, ...]:
    shapes = MATRICES[aligned]
    return [_randn(*s, dtype=dtype, device=device) for s in shapes], [
        [_randn(*s, dtype=ref_dtype, device=device) for _ in range(refs)] for s in shapes
    ]


def _make_wgrad(
    device: str, dtype: torch.dtype, ref_dtype: torch.dtype, refs: int, aligned: bool
) -> tuple[Any, ...]:
    ins, outs = FEATURES[aligned]
    x = _randn(3, LENGTHS[0], ins, dtype=dtype, device=device)
    dy = _randn(3, LENGTHS[0], outs, dtype=dtype, device=device)
    return x, dy, [_randn(outs, ins, dtype=ref_dtype, device=device) for _ in range(refs)]


def _make_grouped(
    device: str, dtype: torch.dtype, ref_dtype: torch.dtype, refs: int, aligned: bool
) -> tuple[Any, ...]:
    ins, outs = FEATURES[aligned]
    x = _randn(sum(SEGMENTS[0]), ins, dtype=dtype, device=device)
    dy = _randn(sum(SEGMENTS[0]), outs, dtype=dtype, device=device)
    return x, dy, [_randn(EXPERTS, outs, ins, dtype=ref_dtype, device=device) for _ in range(refs)]


def _operators(
    dtype: torch.dtype, ref_dtype: torch.dtype, refs: int, aligned: bool
) -> list[Operator]:
    short = {F32: "f32", BF16: "bf16", F16: "f16", F8: "f8"}
    label = f"{short[dtype]}-{refs}x{short[ref_dtype]}-{'aligned' if aligned else 'odd'}"
    kind = {"dtype": dtype, "ref_dtype": ref_dtype, "refs": refs, "aligned": aligned}
    return [
        Operator(
            "moments",
            label,
            functools.partial(_make_moments, **kind),
            lambda g, r, axis: moments(g, r, axis),
            lambda g, r, axis: reference.moments(g, r, axis),
            lambda g, r, axis: reference.moments(
                [t.abs() for t in g], [[t.float().abs() for t in group] for group in r], axis
            ),
        ),
        Operator(
            "wgrad_moments",
            label,
            functools.partial(_make_wgrad, **kind),
            lambda x, dy, r, axis: wgrad_moments(x, dy, r, axis, lengths=LENGTHS),
            lambda x, dy, r, axis: reference.wgrad_moments(x, dy, r, axis, lengths=LENGTHS),
            lambda x, dy, r, axis: reference.wgrad_moments(
                x.abs(), dy.abs(), [t.float().abs() for t in r], axis, lengths=LENGTHS
            ),
        ),
        Operator(
            "grouped_wgrad_moments",
            label,
            functools.partial(_make_grouped, **kind),
            lambda x, dy, r, axis: grouped_wgrad_moments(x, dy, r, *SEGMENTS, axis),
            lambda x, dy, r, axis: reference.grouped_wgrad_moments(x, dy, r, *SEGMENTS, axis),
            lambda x, dy, r, axis: reference.grouped_wgrad_moments(
                x.abs(), dy.abs(), [t.float().abs() for t in r], *SEGMENTS, axis
            ),
        ),
    ]


BOTH = (True, False)
# What every test runs: each kind of load, and float8 references.
OPERATORS = [
    operator
    for dtype, ref_dtype in ((BF16, BF16), (F32, F32), (BF16, F8))
    for aligned in BOTH
    for operator in _operators(dtype, ref_dtype, 2, aligned)
]
# Further ones for the comparison with the oracle: every pair of dtypes, every number of references.
_LABELS = {operator.label for operator in OPERATORS}
MORE = [
    operator
    for dtype, ref_dtype, refs in (
        *itertools.product((F32, BF16, F16), (F32, BF16, F16, F8), (2,)),
        *itertools.product((BF16, F32), (BF16,), (1, 3, 4)),
    )
    for aligned in BOTH
    for operator in _operators(dtype, ref_dtype, refs, aligned)
    if operator.label not in _LABELS
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

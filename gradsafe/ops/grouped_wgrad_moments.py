"""Moments of the weight gradients of fused experts, one gradient per segment of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.ops.checks import check_bool, check_ints
from gradsafe.ops.moments import Axis, Moments, axis_code, out_size
from gradsafe.ops.registry import operator
from gradsafe.ops.wgrad_moments import check_wgrad, unpack

OP = "grouped_wgrad_moments"


def grouped_wgrad_moments(
    x: Tensor,
    dy: Tensor,
    refs: Sequence[Tensor],
    lengths: Sequence[int],
    experts: Sequence[int],
    axis: Axis = "tensor",
    unsigned: bool = True,
) -> Moments | tuple[Moments, Moments]:
    """Moments of G_s = dy_s^T x_s for every segment s, against the references of its expert.

    For a mixture of experts whose weights are one parameter `[E, O, I]`: a segment is the tokens of
    one sample that reached one expert, and its gradient belongs to that expert's matrix. The result
    of a segment is what `wgrad_moments` gives for it alone with `refs[k][experts[s]]`, on the CPU
    bit by bit. Segments may come in any order; a reference is read once for all segments of its
    expert, those of experts without a segment are never read, and nothing of `[E, O, I]` is
    allocated.

    Args:
        x: inputs `[N, I]`, float32, bfloat16 or float16, rows unbroken in memory; segment s owns
            the `lengths[s]` rows behind those of segment s - 1.
        dy: output gradients `[N, O]`, dtype and device of x.
        refs: 0 to 4 references `[E, O, I]` on the same device, one dtype, which may be another than
            that of x and may also be float8_e4m3fn (see `moments` for scales). Rows are unbroken;
            strides between rows and between experts are free.
        lengths: rows of each segment, S ints that add up to N; one may be 0.
        experts: the expert of each segment, S ints from 0 to E - 1.
        axis: "tensor", "row" (one result per output feature), "column" (per input feature), "both".
        unsigned: dots of abs(G) with the references (True) or of G (False).

    Returns:
        `Moments` whose fields are tensors with a leading S: `count`, `sum` and `sum_sq`
        `[S, *slice]`, `dots` `[S, K, *slice]`, float64. For axis "both" the pair (rows, columns). A
        segment without rows has its count and zeros.

    Raises:
        TypeError: something is no tensor, or of another dtype; lengths or experts are a tensor.
        ValueError: shapes, strides, devices, lengths, experts, axis or the number of references.
        RuntimeError: CUDA tensors without CUDA kernels, or CUDA failed.
    """
    code = axis_code(OP, axis)
    check_bool(OP, "unsigned", unsigned)
    check_wgrad(OP, x, dy, refs, ("N",), stacked=True)
    _check_segments(len(x), lengths, experts, len(refs[0]) if refs else None)
    out = torch.ops.gradsafe.grouped_wgrad_moments(
        x, dy, list(refs), list(lengths), list(experts), code, unsigned
    )
    return unpack(out, dy.shape[1], x.shape[1], len(refs), axis)


def _check_segments(
    rows: int, lengths: Sequence[int], experts: Sequence[int], matrices: int | None
) -> None:
    check_ints(OP, "lengths", lengths)
    check_ints(OP, "experts", experts)
    if len(experts) != len(lengths):
        refuse(OP, f"one expert for each of {len(lengths)} segments", len(experts))
    for s, length in enumerate(lengths):
        if length < 0:
            refuse(OP, f"lengths[{s}] of at least 0", length)
    if sum(lengths) != rows:
        refuse(OP, f"lengths that add up to N = {rows}", sum(lengths))
    for s, expert in enumerate(experts):
        if expert < 0 or (matrices is not None and expert >= matrices):
            limit = "at least 0" if matrices is None else f"below E = {matrices} and not negative"
            refuse(OP, f"experts[{s}] {limit}", expert)


@operator(
    "grouped_wgrad_moments(Tensor x, Tensor dy, Tensor[] refs, int[] lengths, int[] experts, "
    "int axis, bool unsigned) -> Tensor",
    differentiable=False,
)
def _fake(
    x: Tensor, dy: Tensor, refs: list[Tensor], lengths: list[int], _: list[int], axis: int, *__: Any
) -> Tensor:
    per_segment = out_size(axis, len(refs), dy.shape[1], x.shape[1])
    return x.new_empty((len(lengths), per_segment), dtype=torch.float64)

"""Moments of gradients and their dot products with references, in one read of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.ops.checks import (
    FLOAT_DTYPES,
    REF_DTYPES,
    are_alike,
    check_bool,
    check_device,
    check_like,
    check_matrix,
    check_supported_device,
    check_tensor_list,
)
from gradsafe.ops.registry import operator

Axis = Literal["tensor", "row", "column", "both"]
AXES: tuple[Axis, ...] = ("tensor", "row", "column", "both")  # position = code of the operator
MAX_REFS = 4
_SHAPE = attrgetter("shape")


@dataclass(frozen=True)
class Moments:
    """Sums over the slices of each gradient; field[n] belongs to gradient n.

    `moments` gives lists of tensors, one per gradient of its list; `wgrad_moments` gives tensors
    with a leading B, one row per sample, `grouped_wgrad_moments` with a leading S, one per segment.
    All tensors are float64. The slice shape is `[]` for axis "tensor", `[O]` for "row" and `[I]`
    for "column".

    Attributes:
        count: entries per slice, of the slice shape.
        sum: sum of g.
        sum_sq: sum of g^2.
        dots: `[K, *slice shape]`, sum of abs(g) * r_k (of g * r_k if signed).
    """

    count: list[Tensor] | Tensor
    sum: list[Tensor] | Tensor
    sum_sq: list[Tensor] | Tensor
    dots: list[Tensor] | Tensor

    def std(self) -> list[Tensor]:
        """Population standard deviation of every slice, one tensor per gradient.

        From sums and sums of squares, so it loses digits where a slice's mean is far larger than
        its spread: the relative error is about 1e-7 * (mean / std)^2. 0 without entries.
        """
        fields = zip(self.count, self.sum, self.sum_sq, strict=True)
        return [standard_deviation(*field) for field in fields]


def standard_deviation(count: Tensor, total: Tensor, total_sq: Tensor) -> Tensor:
    """Population standard deviation from count, sum and sum of squares, float64 of one shape."""
    entries = count.clamp(min=1)
    mean = total / entries
    # Rounding can push the variance of constant values below zero by its last bit.
    return (total_sq / entries - mean * mean).clamp(min=0).sqrt()


def moments(
    grads: Sequence[Tensor],
    refs: Sequence[Sequence[Tensor]] | None = None,
    axis: Axis = "tensor",
    unsigned: bool = True,
) -> Moments | tuple[Moments, Moments]:
    """Counts, sums, sums of squares and dots with K references, per slice of each gradient.

    Every gradient and reference is read once, whatever the axis and the number of references, and
    the whole list is handled by one call of the backend. Sums run in float32 within a fixed chunk
    and in float64 across chunks, in a fixed order: results do not depend on the number of threads,
    on the CPU's vector width (AVX2 or AVX-512), or on the other gradients of the list. NaN and Inf
    reach the slices that hold them and no others.

    This is the sum behind the GradCoo score (arXiv 2502.12411): with r = abs(G_ref) / std(G_ref),
    `dots / std()` is the dot product of the std-normalised absolute gradient with the reference.

    Args:
        grads: matrices `[O_n, I_n]`, float32, bfloat16 or float16, one dtype and device for all.
            Rows must be unbroken (unit stride along I); the stride between rows is free.
        refs: for each gradient its K references (0 to 4) of the same shape and device; one dtype
            for all references, which may differ from that of the gradients and may also be
            float8_e4m3fn. Dots are linear in a reference: one that was divided by a scale to fit
            its dtype gives dots divided by that scale. None means K = 0.
        axis: "tensor", "row", "column", or "both" for rows and columns in one read.
        unsigned: dots of abs(g) with the reference (True) or of g (False).

    Returns:
        `Moments`; for axis "both" the pair (rows, columns). An empty list gives empty lists. A
        matrix without entries has zero sums.

    Raises:
        TypeError: something is no tensor, or of another dtype.
        ValueError: shapes, strides, devices, the number of references or the axis do not fit.
        RuntimeError: CUDA tensors without CUDA kernels, or CUDA failed.
    """
    code = axis_code("moments", axis)
    check_bool("moments", "unsigned", unsigned)
    flat_refs, num_refs = _alike(grads, refs) or _check(grads, refs)
    if not grads:
        empty = Moments([], [], [], [])
        return (empty, Moments([], [], [], [])) if axis == "both" else empty
    out = torch.ops.gradsafe.moments(list(grads), flat_refs, num_refs, code, unsigned)
    return _unpack(out, [tuple(g.shape) for g in grads], num_refs, axis)


def axis_code(op: str, axis: Axis) -> int:
    """The operator's number for an axis."""
    if not isinstance(axis, str) or axis not in AXES:
        refuse(op, f"axis in {list(AXES)}", repr(axis))
    return AXES.index(axis)


def out_size(axis_code: int, num_refs: int, rows: int, cols: int) -> int:
    """Entries of the operator's result that one `[rows, cols]` gradient fills."""
    return (1, rows, cols, rows + cols)[axis_code] * (3 + num_refs)


def _alike(
    grads: Sequence[Tensor], refs: Sequence[Sequence[Tensor]] | None
) -> tuple[list[Tensor], int] | None:
    """The references as one list and K, if a quick look finds nothing wrong; else None."""
    kinds = (list, tuple)
    if not isinstance(grads, kinds) or not grads or not isinstance(grads[0], Tensor):
        return None
    device = grads[0].device
    if not are_alike(grads, FLOAT_DTYPES, device):
        return None
    check_supported_device("moments", grads[0])
    if refs is None:
        return [], 0
    if not isinstance(refs, kinds) or len(refs) != len(grads):
        return None
    if not all(isinstance(group, kinds) and len(group) <= MAX_REFS for group in refs):
        return None
    count = len(refs[0])
    flat = [ref for group in refs for ref in group]
    shapes = list(map(_SHAPE, grads))
    fits = (
        all(len(group) == count for group in refs)
        and are_alike(flat, REF_DTYPES, device)
        and all(list(map(_SHAPE, flat[k::count])) == shapes for k in range(count))
    )
    return (flat, count) if fits else None


def _check(
    grads: Sequence[Tensor], refs: Sequence[Sequence[Tensor]] | None
) -> tuple[list[Tensor], int]:
    """The same, one argument after the other; raises where one does not fit."""
    op = "moments"
    check_tensor_list(op, "grads", grads)
    for index, grad in enumerate(grads):
        check_matrix(op, f"grads[{index}]", grad)
        check_like(op, f"grads[{index}]", grad, "grads[0]", grads[0])
    if grads:
        check_supported_device(op, grads[0])
    if refs is None:
        return [], 0
    expected = f"refs to hold one list of references for each of {len(grads)} gradients"
    if isinstance(refs, str) or not isinstance(refs, Sequence):
        got = "a tensor" if isinstance(refs, Tensor) else type(refs).__name__
        refuse(op, expected, got, kind=TypeError)
    if len(refs) != len(grads):
        refuse(op, expected, len(refs))
    if refs:
        check_tensor_list(op, "refs[0]", refs[0])
    num_refs = len(refs[0]) if refs else 0
    if num_refs > MAX_REFS:
        refuse(op, f"0 to {MAX_REFS} references per gradient", num_refs)
    flat: list[Tensor] = []
    for index, group in enumerate(refs):
        check_tensor_list(op, f"refs[{index}]", group)
        if len(group) != num_refs:
            refuse(op, f"refs[{index}] to hold {num_refs} references like refs[0]", len(group))
        for k, ref in enumerate(group):
            name, grad = f"refs[{index}][{k}]", grads[index]
            if ref.shape != grad.shape:
                refuse(op, f"{name} of shape {list(grad.shape)}", list(ref.shape))
            check_matrix(op, name, ref, REF_DTYPES)
            check_like(op, name, ref, "refs[0][0]", refs[0][0])
            check_device(op, name, ref, f"grads[{index}]", grad)
            flat.append(ref)
    return flat, num_refs


def _unpack(
    out: Tensor, shapes: list[tuple[int, ...]], num_refs: int, axis: Axis
) -> Moments | tuple[Moments, Moments]:
    """Views into the operator's one vector: per gradient [3 + K, slices], rows before columns."""
    reported = 3 + num_refs
    if axis == "tensor":
        table = out.view(len(shapes), reported)
        count, total, squares = (list(table[:, q].unbind()) for q in range(3))
        return Moments(count, total, squares, list(table[:, 3:].unbind()))
    kinds = [dim for dim, name in enumerate(("row", "column")) if axis in (name, "both")]
    sizes = [reported * shape[dim] for shape in shapes for dim in kinds]
    tables = [block.view(reported, -1 if block.numel() else 0) for block in out.split(sizes)]
    found = []
    for begin in range(len(kinds)):
        own = tables[begin :: len(kinds)]
        count, total, squares = ([table[q] for table in own] for q in range(3))
        found.append(Moments(count, total, squares, [table[3:] for table in own]))
    return (found[0], found[1]) if axis == "both" else found[0]


@operator(
    "moments(Tensor[] grads, Tensor[] refs, int num_refs, int axis, bool unsigned) -> Tensor",
    differentiable=False,
)
def _fake(
    grads: list[Tensor], refs: list[Tensor], num_refs: int, axis: int, unsigned: bool
) -> Tensor:
    size = sum(out_size(axis, num_refs, grad.shape[0], grad.shape[1]) for grad in grads)
    return grads[0].new_empty(size, dtype=torch.float64)

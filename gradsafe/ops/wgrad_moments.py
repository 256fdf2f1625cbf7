"""Moments of weight gradients that are never stored, from the factors of each gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.ops.checks import (
    REF_DTYPES,
    check_bool,
    check_dense,
    check_device,
    check_ints,
    check_like,
    check_rows,
    check_shape,
    check_supported_device,
    check_tensor,
    check_tensor_list,
)
from gradsafe.ops.moments import MAX_REFS, Axis, Moments, axis_code, out_size
from gradsafe.ops.registry import operator

OP = "wgrad_moments"


def wgrad_moments(
    x: Tensor,
    dy: Tensor,
    refs: Sequence[Tensor] = (),
    axis: Axis = "tensor",
    unsigned: bool = True,
    lengths: Sequence[int] | None = None,
) -> Moments | tuple[Moments, Moments]:
    """Moments of G_b = dy_b^T x_b for every sample b, without G ever reaching memory.

    The same sums as `moments`, for the weight gradients of a linear layer whose input was x and
    whose output gradient is dy. abs() acts on an entry of G after the sum over tokens, so every
    entry must exist once; it does so in a panel that stays in cache and is overwritten by the next.
    References are read once for all samples of the batch. Products and sums over tokens are
    float32, in token order; the rest is as in `moments`, and so is the determinism: a sample's
    result depends neither on the other samples of the batch nor on threads.

    Args:
        x: layer inputs `[B, T, I]`, float32, bfloat16 or float16; features unbroken in memory.
        dy: output gradients `[B, T, O]`, dtype and device of x.
        refs: 0 to 4 references `[O, I]` on the same device, one dtype, which may be another than
            that of x and may also be float8_e4m3fn (see `moments` for scales).
        axis: "tensor", "row" (one result per output feature), "column" (per input feature), "both".
        unsigned: dots of abs(G) with the references (True) or of G (False).
        lengths: tokens of each sample, counted from its first; the rest of its T rows is padding
            and is never read. None means T for all.

    Returns:
        `Moments` whose fields are tensors with a leading B instead of lists: `count`, `sum` and
        `sum_sq` `[B, *slice]`, `dots` `[B, K, *slice]`, float64. For axis "both" the pair (rows,
        columns). A sample without tokens, or whose dy is 0, has zeros, whatever the references.

    Raises:
        TypeError: something is no tensor, or of another dtype.
        ValueError: shapes, strides, devices, lengths, the number of references or the axis.
        RuntimeError: CUDA tensors without CUDA kernels, or CUDA failed.
    """
    code = axis_code(OP, axis)
    check_bool(OP, "unsigned", unsigned)
    check_wgrad(OP, x, dy, refs, ("B", "T"))
    sizes = _check_lengths(x, lengths)
    out = torch.ops.gradsafe.wgrad_moments(x, dy, list(refs), sizes, code, unsigned)
    return unpack(out, dy.shape[2], x.shape[2], len(refs), axis)


def unpack(
    out: Tensor, rows: int, cols: int, num_refs: int, axis: Axis
) -> Moments | tuple[Moments, Moments]:
    """Views into the operator's result `[B, results of one sample]`."""
    reported = 3 + num_refs
    if axis == "tensor":
        return Moments(out[:, 0], out[:, 1], out[:, 2], out[:, 3:])
    parts = []
    begin = 0
    for name, slices in (("row", rows), ("column", cols)):
        if axis in (name, "both"):
            block = out[:, begin : begin + reported * slices]
            table = block.unflatten(1, (reported, slices))
            parts.append(Moments(table[:, 0], table[:, 1], table[:, 2], table[:, 3:]))
            begin += reported * slices
    return (parts[0], parts[1]) if axis == "both" else parts[0]


def check_wgrad(
    op: str,
    x: Tensor,
    dy: Tensor,
    refs: Sequence[Tensor],
    dims: tuple[str, ...],
    stacked: bool = False,
) -> None:
    """The tensors: x `[*dims, I]`, dy `[*dims, O]`, refs `[O, I]`, or stacked `[E, O, I]`."""
    check_tensor_list(op, "refs", refs)
    lead = ", ".join(dims)
    for name, tensor, features in (("x", x, "I"), ("dy", dy, "O")):
        check_tensor(op, name, tensor)
        check_shape(op, name, tensor, f"[{lead}, {features}]")
        check_dense(op, name, tensor)
        if not _is_one_matrix(tensor):
            got = f"strides {list(tensor.stride())}"
            refuse(op, f"{name} to be rows of one matrix", got, "call .contiguous() first")
    if x.shape[:-1] != dy.shape[:-1]:
        expected = f"dy of shape [{lead}, O] with [{lead}] = {list(x.shape[:-1])} like x"
        refuse(op, expected, list(dy.shape))
    check_like(op, "dy", dy, "x", x)
    check_supported_device(op, x)
    if len(refs) > MAX_REFS:
        refuse(op, f"0 to {MAX_REFS} references", len(refs))
    names, shape = "[O, I]", [dy.shape[-1], x.shape[-1]]
    if stacked and refs:  # the first reference gives E
        names, shape = "[E, O, I]", [*refs[0].shape[:1], *shape]
    for k, ref in enumerate(refs):
        if list(ref.shape) != shape:
            refuse(op, f"refs[{k}] of shape {names} = {shape}", list(ref.shape))
        check_rows(op, f"refs[{k}]", ref, REF_DTYPES)
        check_like(op, f"refs[{k}]", ref, "refs[0]", refs[0])
        check_device(op, f"refs[{k}]", ref, "x", x)


def _check_lengths(x: Tensor, lengths: Sequence[int] | None) -> list[int]:
    if lengths is None:
        return []
    check_ints(OP, "lengths", lengths)
    if len(lengths) != x.shape[0]:
        refuse(OP, f"one length for each of {x.shape[0]} samples", len(lengths))
    for b, length in enumerate(lengths):
        if not 0 <= length <= x.shape[1]:
            refuse(OP, f"lengths[{b}] between 0 and T = {x.shape[1]}", length)
    return list(lengths)


def _is_one_matrix(tensor: Tensor) -> bool:
    """Whether [B, T, features] can be read as [B * T, features] with one row stride."""
    if tensor.numel() == 0:
        return True
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False
    if tensor.dim() == 2:
        return True
    samples, tokens, _ = tensor.shape
    return samples <= 1 or tokens <= 1 or tensor.stride(0) == tokens * tensor.stride(1)


@operator(
    "wgrad_moments(Tensor x, Tensor dy, Tensor[] refs, int[] lengths, int axis, bool unsigned) "
    "-> Tensor",
    differentiable=False,
)
def _fake(
    x: Tensor, dy: Tensor, refs: list[Tensor], lengths: list[int], axis: int, unsigned: bool
) -> Tensor:
    per_sample = out_size(axis, len(refs), dy.shape[2], x.shape[2])
    return x.new_empty((x.shape[0], per_sample), dtype=torch.float64)

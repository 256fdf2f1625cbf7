"""SafeGrad's gradient surgery: conflict test, projection and merge of two lists of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from gradsafe.ops.checks import (
    FLOAT_DTYPES,
    check_device,
    check_supported_device,
    check_tensor_list,
    check_twin,
    is_unbroken,
)

SUMS = ("dot", "sq_user", "sq_align")  # of a row of `surgery_sums`
RESULTS = (*SUMS, "coefficient")  # of a row of `surgery_`


def surgery_(
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    rho: float = 1.0,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Projects the user gradient off a conflict with the alignment gradient and merges both.

    Both lists are seen as one long vector each, u and a, with one conflict test (SafeGrad, arXiv
    2508.07172, Eq. 3 to 5):

        coefficient = rho - min(<u, a>, 0) / <a, a>
        u <- u + coefficient * a

    With a conflict (<u, a> < 0) the part of u along a is removed before rho * a is added; without
    one only rho * a is added. Both lists are read twice and `user` is written once. The test is
    decided on the device: nothing waits for the host, and the call may be captured in a CUDA graph.

    Products and sums run in float32 within a fixed chunk and in float64 across chunks, in a fixed
    order: results do not depend on the number of threads or on the CPU's vector width (AVX2 or
    AVX-512). The merge is one fused multiply-add in float32, rounded once.

    NaN or Inf in either gradient, or a square beyond float32 (values from about 1e19), makes a sum
    non-finite: the coefficient is then NaN, and `user` is left untouched. Look at the result to
    skip such a step. Without an alignment gradient (<a, a> = 0: zeros, or values below about 1e-23,
    whose squares vanish in float32) there is no conflict and the coefficient is rho.

    Args:
        user: gradients of the user loss, of any shapes; float32, bfloat16 or float16. Written.
            Each fills its memory without gaps, in any order of dimensions (a transposed weight is
            fine). Tensors without elements, and empty lists, are fine. No tensor may require a
            gradient or share memory with another.
        align: gradients of the alignment loss: for each tensor of `user` one of the same shape,
            strides and dtype. All on one device.
        rho: weight of the alignment gradient, finite and not negative. 0 is projection alone.
        groups: number of the conflict test of each tensor, from 0 to G - 1, each used at least
            once. None: one test for all.

    Returns:
        float64 `[4]` on the device: dot, sq_user, sq_align (before the merge) and coefficient;
        `[G, 4]` if groups are given. An empty list gives zeros and rho, on the CPU.

    Raises:
        TypeError: something is no tensor, or of another dtype.
        ValueError: shapes, strides, devices, rho or groups do not fit.
        RuntimeError: tensors that share memory, CUDA tensors without CUDA kernels, or CUDA failed.
    """
    numbers, count = check_pairs("surgery_", user, align, groups)
    check_rho("surgery_", rho)
    if not user:
        out = torch.zeros(count, 4, dtype=torch.float64)
        out[:, 3] = rho
    else:
        with torch.no_grad():
            out = torch.ops.gradsafe.surgery_(list(user), list(align), float(rho), numbers, count)
        mark_written(user)
    return out[0] if groups is None else out


def surgery_sums(
    user: Sequence[Tensor], align: Sequence[Tensor], groups: Sequence[int] | None = None
) -> Tensor:
    """The first half of `surgery_`: dot, sq_user and sq_align of each conflict test.

    For gradients sharded over ranks: add up the sums of all ranks (one all-reduce of three numbers
    per group), then `surgery_merge_` every shard with them.

    Args:
        user: as in `surgery_`; only read.
        align: as in `surgery_`.
        groups: as in `surgery_`.

    Returns:
        float64 `[3]`, or `[G, 3]` if groups are given. An empty list gives zeros, on the CPU.

    Raises:
        TypeError, ValueError, RuntimeError: as `surgery_`.
    """
    numbers, count = check_pairs("surgery_sums", user, align, groups)
    if not user:
        out = torch.zeros(count, 3, dtype=torch.float64)
    else:
        out = torch.ops.gradsafe.surgery_sums(list(user), list(align), numbers, count)
    return out[0] if groups is None else out


def surgery_merge_(
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    sums: Tensor,
    rho: float = 1.0,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """The second half of `surgery_`: the merge, with given sums.

    Args:
        user: as in `surgery_`; written.
        align: as in `surgery_`.
        sums: what `surgery_sums` returned, or its sum over ranks: float64 `[3]`, or `[G, 3]` if
            groups are given, on the device of the gradients.
        rho: as in `surgery_`.
        groups: as in `surgery_`. This rank's tensors need not use every group of `sums`.

    Returns:
        As `surgery_`.

    Raises:
        TypeError, ValueError, RuntimeError: as `surgery_`.
    """
    op = "surgery_merge_"
    table = check_sums(op, sums, groups)
    numbers, _ = check_pairs(op, user, align, groups, len(table))
    check_rho(op, rho)
    if user:
        check_device(op, "sums", sums, "user[0]", user[0])
    with torch.no_grad():
        out = torch.ops.gradsafe.surgery_merge_(list(user), list(align), table, float(rho), numbers)
    mark_written(user)
    return out[0] if groups is None else out


def check_pairs(
    op: str,
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    groups: Sequence[int] | None,
    num_groups: int | None = None,
) -> tuple[list[int], int]:
    """Checks two lists of gradients; returns the operator's groups and their number.

    `num_groups` is that of given sums; without it every group must be used.
    """
    check_tensor_list(op, "user", user)
    check_tensor_list(op, "align", align)
    if len(align) != len(user):
        raise ValueError(
            f"gradsafe.{op}: expected align to hold {len(user)} tensors like user, got {len(align)}"
        )
    for index, (u, a) in enumerate(zip(user, align, strict=True)):
        name = f"user[{index}]"
        check_gradient(op, name, u)
        check_device(op, name, u, "user[0]", user[0])
        check_twin(op, f"align[{index}]", a, name, u)
        if a.requires_grad:
            check_gradient(op, f"align[{index}]", a)
    if user:
        check_supported_device(op, user[0])
    return _check_groups(op, len(user), groups, num_groups)


def check_gradient(op: str, name: str, tensor: Tensor) -> None:
    """A dense float tensor without gaps that autograd does not follow."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"gradsafe.{op}: expected {name} to be dense, got {tensor.layout}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"gradsafe.{op}: expected {name} of dtype float32, bfloat16 or float16, got "
            f"{tensor.dtype}"
        )
    if not is_unbroken(tensor):
        raise ValueError(
            f"gradsafe.{op}: expected {name} without gaps or overlaps in memory, got strides "
            f"{list(tensor.stride())} for shape {list(tensor.shape)}; call .contiguous() first"
        )
    if tensor.requires_grad:
        raise ValueError(
            f"gradsafe.{op}: expected {name} not to require a gradient (surgery is not "
            "differentiable); call .detach() first"
        )


def check_rho(op: str, rho: float) -> None:
    """A finite number, not negative."""
    if isinstance(rho, bool) or not isinstance(rho, Real):
        kind = "a tensor" if isinstance(rho, Tensor) else repr(rho)
        raise TypeError(f"gradsafe.{op}: expected rho to be a number, got {kind}")
    if not 0 <= rho < math.inf:
        raise ValueError(f"gradsafe.{op}: expected rho to be finite and >= 0, got {rho}")


def check_sums(op: str, sums: Tensor, groups: Sequence[int] | None) -> Tensor:
    """The sums as `[G, 3]`."""
    if not isinstance(sums, Tensor):
        raise TypeError(f"gradsafe.{op}: expected sums to be a tensor, got {type(sums).__name__}")
    if sums.dtype != torch.float64:
        raise TypeError(f"gradsafe.{op}: expected sums of dtype float64, got {sums.dtype}")
    wanted = "[3]" if groups is None else "[G, 3]"
    if sums.dim() != len(wanted.split(",")) or sums.shape[-1] != len(SUMS):
        raise ValueError(f"gradsafe.{op}: expected sums of shape {wanted}, got {list(sums.shape)}")
    return sums.reshape(-1, len(SUMS)).contiguous()


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tells autograd, which does not see the backend write (torch.compile does, by the schema)."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _check_groups(
    op: str, tensors: int, groups: Sequence[int] | None, num_groups: int | None
) -> tuple[list[int], int]:
    if groups is None:
        return [], 1
    if isinstance(groups, Tensor):
        raise TypeError(
            f"gradsafe.{op}: expected groups to be a list of ints, got a tensor; they are needed "
            "on the host, pass groups.tolist()"
        )
    if len(groups) != tensors:
        raise ValueError(
            f"gradsafe.{op}: expected one group for each of {tensors} tensors, got {len(groups)}"
        )
    used = set(groups)
    count = len(used) if num_groups is None else num_groups
    for index, group in enumerate(groups):
        if not 0 <= group < count:
            why = "numbers from 0 on without gaps" if num_groups is None else "rows of sums"
            raise ValueError(
                f"gradsafe.{op}: expected groups[{index}] between 0 and {count - 1} (groups are "
                f"{why}), got {group}"
            )
    return list(groups), count


@torch.library.register_fake("gradsafe::surgery_sums")
def _fake_sums(
    user: list[Tensor], align: list[Tensor], groups: list[int], num_groups: int
) -> Tensor:
    return user[0].new_empty((num_groups, len(SUMS)), dtype=torch.float64)


@torch.library.register_fake("gradsafe::surgery_merge_")
def _fake_merge(
    user: list[Tensor], align: list[Tensor], sums: Tensor, rho: float, groups: list[int]
) -> Tensor:
    return sums.new_empty((sums.shape[0], len(RESULTS)))


@torch.library.register_fake("gradsafe::surgery_")
def _fake(
    user: list[Tensor], align: list[Tensor], rho: float, groups: list[int], num_groups: int
) -> Tensor:
    return user[0].new_empty((num_groups, len(RESULTS)), dtype=torch.float64)

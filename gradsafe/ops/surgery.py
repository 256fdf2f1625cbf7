"""SafeGrad's gradient surgery: conflict test, projection and merge of two lists of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.ops.checks import (
    FLOAT_DTYPES,
    are_twins,
    check_apart,
    check_dense,
    check_device,
    check_ints,
    check_number,
    check_same_length,
    check_supported_device,
    check_tensor,
    check_tensor_list,
    check_twin,
    is_unbroken,
    written,
)
from gradsafe.ops.registry import operator

SUMS = ("dot", "sq_user", "sq_align")  # of a row of `surgery_sums`
RESULTS = (*SUMS, "coefficient")  # of a row of `surgery_`
_REQUIRES_GRAD = attrgetter("requires_grad")


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
        out = no_conflict(count, rho)
    else:
        with torch.no_grad():
            out = torch.ops.gradsafe.surgery_(list(user), list(align), float(rho), numbers, count)
        written(user)
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
        out = torch.zeros(count, len(SUMS), dtype=torch.float64)
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
        for index, tensor in enumerate(user):
            check_apart(op, f"user[{index}]", tensor, "sums", table)
    with torch.no_grad():
        out = torch.ops.gradsafe.surgery_merge_(list(user), list(align), table, float(rho), numbers)
    written(user)
    return out[0] if groups is None else out


def no_conflict(count: int, rho: float) -> Tensor:
    """The result for empty lists."""
    out = torch.zeros(count, len(RESULTS), dtype=torch.float64)
    out[:, -1] = rho
    return out


def check_pairs(
    op: str,
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    groups: Sequence[int] | None,
    num_groups: int | None = None,
) -> tuple[list[int], int]:
    """Checks two lists of gradients; returns the operator's groups and their number.

    `num_groups` is the number of given sums; without them every group must be used.
    """
    if not (
        are_twins(FLOAT_DTYPES, user, align)
        and not any(map(_REQUIRES_GRAD, user))
        and not any(map(_REQUIRES_GRAD, align))
    ):
        _check_pair_by_pair(op, user, align)
    if user:
        check_supported_device(op, user[0])
    return _check_groups(op, len(user), groups, num_groups)


def _check_pair_by_pair(op: str, user: Sequence[Tensor], align: Sequence[Tensor]) -> None:
    """Raises where an argument does not fit."""
    check_tensor_list(op, "user", user)
    check_tensor_list(op, "align", align)
    check_same_length(op, "align", align, "user", len(user))
    for index, (u, a) in enumerate(zip(user, align, strict=True)):
        name = f"user[{index}]"
        check_dense(op, name, u)
        if not is_unbroken(u):
            got = f"strides {list(u.stride())} for shape {list(u.shape)}"
            expected = f"{name} without gaps or overlaps in memory"
            refuse(op, expected, got, "call .contiguous() first")
        check_device(op, name, u, "user[0]", user[0])
        check_twin(op, f"align[{index}]", a, name, u)
        for kind, tensor in (("user", u), ("align", a)):
            if tensor.requires_grad:
                expected = f"{kind}[{index}] not to require a gradient"
                do = "surgery is not differentiable, call .detach() first"
                refuse(op, expected, "one that does", do)


def check_rho(op: str, rho: float) -> None:
    """A finite number, not negative."""
    check_number(op, "rho", rho)


def check_sums(op: str, sums: Tensor, groups: Sequence[int] | None) -> Tensor:
    """The sums as `[G, 3]`."""
    check_tensor(op, "sums", sums)
    check_dense(op, "sums", sums, (torch.float64,))
    shape = "[3]" if groups is None else "[G, 3]"
    if sums.dim() != shape.count(",") + 1 or sums.shape[-1] != len(SUMS):
        refuse(op, f"sums of shape {shape}", list(sums.shape))
    return sums.reshape(-1, len(SUMS)).contiguous()


def _check_groups(
    op: str, tensors: int, groups: Sequence[int] | None, num_groups: int | None
) -> tuple[list[int], int]:
    if groups is None:
        return [], 1
    check_ints(op, "groups", groups)
    if len(groups) != tensors:
        refuse(op, f"one group for each of {tensors} tensors", len(groups))
    count = len(set(groups)) if num_groups is None else num_groups
    for index, group in enumerate(groups):
        if not 0 <= group < count:
            why = "numbers from 0 on without gaps" if num_groups is None else "rows of sums"
            expected = f"groups[{index}] between 0 and {count - 1} (groups are {why})"
            refuse(op, expected, group)
    return list(groups), count


@operator("surgery_sums(Tensor[] user, Tensor[] align, int[] groups, int num_groups) -> Tensor")
def _fake_sums(user: list[Tensor], *rest: Any) -> Tensor:
    return user[0].new_empty((rest[-1], len(SUMS)), dtype=torch.float64)


@operator(
    "surgery_merge_(Tensor(a!)[] user, Tensor[] align, Tensor sums, float rho, int[] groups) "
    "-> Tensor"
)
def _fake_merge(user: list[Tensor], align: list[Tensor], sums: Tensor, *rest: Any) -> Tensor:
    return sums.new_empty((sums.shape[0], len(RESULTS)))


@operator(
    "surgery_(Tensor(a!)[] user, Tensor[] align, float rho, int[] groups, int num_groups) -> Tensor"
)
def fake_results(tensors: list[Tensor], *rest: Any) -> Tensor:
    """The shape of the results of an operator whose last argument is the number of groups."""
    return tensors[0].new_empty((rest[-1], len(RESULTS)), dtype=torch.float64)

"""Gradient surgery with a subspace of alignment directions in place of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.ops.checks import (
    FLOAT_DTYPES,
    check_dense,
    check_device,
    check_like,
    check_same_length,
    check_supported_device,
    check_tensor,
    check_tensor_list,
    written,
)
from gradsafe.ops.registry import operator
from gradsafe.ops.surgery import check_rho

OP = "subspace_surgery_"
MAX_RANK = 16


def subspace_surgery_(
    user: Sequence[Tensor], basis: Sequence[Tensor], direction: Tensor, rho: float = 0.0
) -> Tensor:
    """Projects the user gradient off a subspace if it opposes the alignment gradient.

    All tensors are seen as one long vector: u, and k orthonormal vectors U_j, for example the first
    left singular vectors of several alignment gradients (SPF, arXiv 2601.10141). The alignment
    gradient is a = sum_j direction_j U_j. With one conflict test:

        dot_j = <u, U_j>
        conflict = <u, a> = sum_j direction_j dot_j
        coefficient_j = rho direction_j - (dot_j if conflict < 0 else 0)
        u <- u + sum_j coefficient_j U_j

    So a user gradient that opposes `a` loses its part in the whole subspace (u - U U^T u), and rho
    times `a` is added in any case. With k = 1, U = a / |a| and direction = |a| this is `surgery_`.

    `user` is read twice and written once, every vector is read twice, whatever k is. Sums run in
    float32 within a fixed chunk and in float64 across chunks, in a fixed order: results do not
    depend on the number of threads or on the CPU's vector width (AVX2 or AVX-512). The vectors are
    added in float32, in their order, and the sum is rounded once. Nothing waits for the host.

    NaN or Inf in a gradient, a vector or the direction, or a square beyond float32, makes the
    conflict NaN, and `user` is left untouched. Whether the vectors are orthonormal is not checked:
    `gradsafe.finetuning.AlignmentSubspace` makes such vectors, and checks given ones.

    Args:
        user: gradients of the user loss, contiguous, of any shapes; float32, bfloat16 or float16.
            Written. No tensor may require a gradient or share memory with another.
        basis: for each tensor of `user` its part of the vectors, `[k, *shape]`, contiguous, of the
            same dtype and device; k from 1 to 16.
        direction: float64 `[k]`, coordinates of the alignment gradient, on the device.
        rho: weight of the alignment gradient, finite and not negative. 0 is projection alone.

    Returns:
        float64 `[2 + 2 k]` on the device: conflict, sq_user (before the projection), the k dots and
        the k coefficients. An empty list gives zeros and rho * direction.

    Raises:
        TypeError: something is no tensor, or of another dtype.
        ValueError: shapes, strides, devices, rho or the number of vectors do not fit.
        RuntimeError: tensors that share memory, CUDA tensors without CUDA kernels, or CUDA failed.
    """
    rank = _check(user, basis, direction)
    check_rho(OP, rho)
    if not user:
        zeros = direction.new_zeros(2 + rank)
        return torch.cat([zeros, rho * direction])
    with torch.no_grad():
        out = torch.ops.gradsafe.subspace_surgery_(list(user), list(basis), direction, float(rho))
    written(user)
    return out


def _check(user: Sequence[Tensor], basis: Sequence[Tensor], direction: Tensor) -> int:
    """Raises where an argument does not fit; returns k."""
    check_tensor(OP, "direction", direction)
    check_dense(OP, "direction", direction, (torch.float64,))
    if direction.dim() != 1 or not direction.is_contiguous():
        refuse(OP, "direction of shape [k], contiguous", list(direction.shape))
    rank = len(direction)
    if not 1 <= rank <= MAX_RANK:
        refuse(OP, f"1 to {MAX_RANK} vectors", rank)
    check_tensor_list(OP, "user", user)
    check_tensor_list(OP, "basis", basis)
    check_same_length(OP, "basis", basis, "user", len(user))
    for index, (u, vectors) in enumerate(zip(user, basis, strict=True)):
        name, own = f"user[{index}]", f"basis[{index}]"
        check_dense(OP, name, u, FLOAT_DTYPES)
        shape = [rank, *u.shape]
        if list(vectors.shape) != shape:
            refuse(OP, f"{own} of shape {shape}", list(vectors.shape))
        check_device(OP, name, u, "direction", direction)
        check_like(OP, own, vectors, name, u)
        for kind, tensor in ((name, u), (own, vectors)):
            if not tensor.is_contiguous():
                refuse(OP, f"{kind} to be contiguous", list(tensor.stride()),
                       "call .contiguous() first")  # fmt: skip
            if tensor.requires_grad:
                do = "surgery is not differentiable, call .detach() first"
                refuse(OP, f"{kind} not to require a gradient", "one that does", do)
    if user:
        check_supported_device(OP, user[0])
    return rank


@operator(
    "subspace_surgery_(Tensor(a!)[] user, Tensor[] basis, Tensor direction, float rho) -> Tensor"
)
def _fake(user: list[Tensor], basis: list[Tensor], direction: Tensor, rho: float) -> Tensor:
    return direction.new_empty(2 + 2 * direction.shape[0])

"""Kullback-Leibler divergence of two sets of logits, and its gradient in place."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.ops.checks import (
    check_apart,
    check_dense,
    check_device,
    check_matrix,
    check_supported_device,
    check_tensor,
    written,
)
from gradsafe.ops.registry import operator


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of every row of logits, in natural logarithms.

    One read of both: maxima and sums are found together, sums run in float32 within 1,024 columns
    (on CUDA within a thread) and in float64 across. Nothing of the size of the logits is allocated.
    Differentiable once with respect to the student, in reverse mode; the backward pass copies its
    logits. To save that copy, use `kl_divergence_`.

    A row depends on its own logits only: not on threads, on the CPU's vector width (AVX2 or
    AVX-512) or on the other rows. Equal rows give exactly 0. A token the teacher excludes (logit
    -inf, or a probability that underflows to 0 in float32) adds nothing, whatever the student says;
    a token that only the student excludes makes the row infinite. NaN or +inf in a row, or a row
    of -inf only, makes that row NaN and no other.

    Args:
        student_logits: `[N, V]`, float32, bfloat16 or float16; N may be 0, V may not. Rows must be
            unbroken (unit stride along V).
        teacher_logits: `[N, V]` on the same device, of the same or another of these dtypes.

    Returns:
        `[N]` float32.

    Raises:
        TypeError: something is no tensor, or of another dtype.
        ValueError: shapes, strides or devices do not fit.
        RuntimeError: CUDA tensors without CUDA kernels, or CUDA failed.
        NotImplementedError: a second derivative, or one in forward mode.
    """
    _check("kl_divergence", student_logits, teacher_logits)
    return torch.ops.gradsafe.kl_divergence(student_logits, teacher_logits)


def kl_divergence_(student_logits: Tensor, teacher_logits: Tensor, weight: Tensor) -> Tensor:
    """`kl_divergence`, and its gradient in place of the student's logits.

    Afterwards `student_logits` holds `weight[n] * (softmax(student_n) - softmax(teacher_n))`, the
    gradient of `sum_n weight[n] * KL_n`. The difference is taken in float32 and rounded to the
    buffer's dtype last. Two reads of every row and one write.

    The gradient is exactly 0 for equal rows, and for rows of weight 0 even if they hold NaN; their
    divergence is reported as that of any other row. In float16 gradients below 6e-8 vanish: use
    weights near 1 there and scale later.

    Args:
        student_logits: as in `kl_divergence`; overwritten. Rows must not overlap.
        teacher_logits: as in `kl_divergence`.
        weight: `[N]` float32, contiguous, on the same device.

    Returns:
        `[N]` float32: the divergences, without the weights.

    Raises:
        TypeError: something is no tensor, or of another dtype.
        ValueError: shapes, strides or devices do not fit, or autograd records the logits.
        RuntimeError: student_logits share memory with another argument, CUDA tensors without CUDA
            kernels, or CUDA failed.
    """
    op = "kl_divergence_"
    _check(op, student_logits, teacher_logits)
    rows, vocabulary = student_logits.shape
    if rows > 1 and student_logits.stride(0) < vocabulary:
        got = f"strides {list(student_logits.stride())}"
        refuse(op, "student_logits whose rows do not overlap", got, "call .contiguous() first")
    check_tensor(op, "weight", weight)
    if weight.shape != (rows,):
        refuse(op, f"weight of shape [{rows}]", list(weight.shape))
    check_dense(op, "weight", weight, (torch.float32,))
    if rows > 1 and weight.stride(0) != 1:
        got = f"strides {list(weight.stride())}"
        refuse(op, "weight to be contiguous", got, "call .contiguous() first")
    check_device(op, "weight", weight, "student_logits", student_logits)
    named = {"student_logits": student_logits, "teacher_logits": teacher_logits, "weight": weight}
    for name, tensor in named.items():
        if name != "student_logits":
            check_apart(op, "student_logits", student_logits, name, tensor)
        if torch.is_grad_enabled() and tensor.requires_grad:
            do = "the gradient replaces the logits; call .detach() first, or use kl_divergence"
            refuse(op, f"{name} without requires_grad", "a tensor that requires it", do)
    value = torch.ops.gradsafe.kl_divergence_(student_logits, teacher_logits, weight)
    written([student_logits])
    return value


def _check(op: str, student: Tensor, teacher: Tensor) -> None:
    for name, tensor in (("student_logits", student), ("teacher_logits", teacher)):
        check_tensor(op, name, tensor)
        check_matrix(op, name, tensor, shape="[N, V]")
    if student.shape[1] == 0:
        refuse(op, "a vocabulary V of at least 1", 0)
    if teacher.shape != student.shape:
        refuse(op, f"teacher_logits of shape {list(student.shape)}", list(teacher.shape))
    check_device(op, "teacher_logits", teacher, "student_logits", student)
    check_supported_device(op, student)


@operator("kl_divergence(Tensor student, Tensor teacher) -> Tensor")
def _fake(student: Tensor, teacher: Tensor) -> Tensor:
    return student.new_empty(student.shape[0], dtype=torch.float32)


@operator("kl_divergence_(Tensor(a!) student, Tensor teacher, Tensor weight) -> Tensor")
def _fake_in_place(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return student.new_empty(student.shape[0], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
    student, teacher = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        _refuse_teacher()
    return _Gradient.apply(student, teacher, grad), None


class _Gradient(torch.autograd.Function):
    """The gradient, which is not differentiable again."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, grad: Tensor) -> Tensor:
        gradient = student.detach().clone(memory_format=torch.contiguous_format)
        torch.ops.gradsafe.kl_divergence_(gradient, teacher.detach(), grad.detach().contiguous())
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            "gradsafe.kl_divergence has no second derivative; detach its gradient, or use "
            "torch.nn.functional.kl_div"
        )


def _refuse_teacher() -> NoReturn:
    raise NotImplementedError(
        "gradsafe.kl_divergence is not differentiable with respect to teacher_logits; detach them"
    )


torch.library.register_autograd("gradsafe::kl_divergence", _backward, setup_context=_save)

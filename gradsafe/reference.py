"""The plain PyTorch definition of every operator.

These functions say what the operators mean. They are the oracle of the tests (called with
`dtype=torch.float64`) and the eager baseline of the benchmarks (called with the input's own dtype).
They are written to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsafe.ops.moments import Axis, Moments


def moments(
    grads: Sequence[Tensor],
    refs: Sequence[Sequence[Tensor]] | None = None,
    axis: Axis = "tensor",
    unsigned: bool = True,
    dtype: torch.dtype | None = torch.float64,
) -> Moments | tuple[Moments, Moments]:
    """What `gradsafe.ops.moments` computes, in `dtype` (None: the dtype of each gradient)."""
    if axis == "both":
        rows = moments(grads, refs, "row", unsigned, dtype)
        columns = moments(grads, refs, "column", unsigned, dtype)
        assert isinstance(rows, Moments)
        assert isinstance(columns, Moments)
        return rows, columns
    result: tuple[list[Tensor], ...] = ([], [], [], [])
    dims = {"tensor": (0, 1), "row": (1,), "column": (0,)}[axis]
    groups = refs if refs is not None else [[] for _ in grads]
    for original, group in zip(grads, groups, strict=True):
        g = original if dtype is None else original.to(dtype)
        factor = g.abs() if unsigned else g
        total = g.sum(dims)
        dots = [(factor * (r if dtype is None else r.to(dtype))).sum(dims) for r in group]
        entries = g.numel() // max(total.numel(), 1) if total.numel() else 0
        result[0].append(torch.full_like(total, entries, dtype=torch.float64))
        result[1].append(total)
        result[2].append((g * g).sum(dims))
        result[3].append(torch.stack(dots) if dots else total.new_empty((0, *total.shape)))
    return Moments(*result)


def wgrad_moments(
    x: Tensor,
    dy: Tensor,
    refs: Sequence[Tensor] = (),
    axis: Axis = "tensor",
    unsigned: bool = True,
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Moments | tuple[Moments, Moments]:
    """What `gradsafe.ops.wgrad_moments` computes: every weight gradient, then its moments."""
    sizes = [x.shape[1]] * len(x) if lengths is None else lengths
    if dtype is not None:
        x, dy = x.to(dtype), dy.to(dtype)
    grads = [dy[b, :size].t() @ x[b, :size] for b, size in enumerate(sizes)]
    result = moments(grads, [list(refs) for _ in grads], axis, unsigned, dtype)
    parts = [_stacked(part) for part in (result if isinstance(result, tuple) else (result,))]
    return (parts[0], parts[1]) if axis == "both" else parts[0]


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, dtype: torch.dtype | None = torch.float64
) -> Tensor:
    """What `gradsafe.ops.kl_divergence` computes: log_softmax, softmax and a sum."""
    if dtype is not None:
        student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.to(dtype)
    log_student = student_logits.log_softmax(1)
    log_teacher = teacher_logits.log_softmax(1)
    teacher = log_teacher.exp()
    terms = teacher * (log_teacher - log_student)
    return torch.where(teacher == 0, torch.zeros_like(terms), terms).sum(1)


def kl_divergence_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """What `gradsafe.ops.kl_divergence_` computes, the gradient in place included."""
    value = kl_divergence(student_logits, teacher_logits, dtype)
    target = student_logits.dtype if dtype is None else dtype
    difference = student_logits.to(target).softmax(1) - teacher_logits.to(target).softmax(1)
    gradient = weight.to(target)[:, None] * difference
    student_logits.copy_(torch.where(weight[:, None] == 0, torch.zeros_like(gradient), gradient))
    return value


def _stacked(part: Moments) -> Moments:
    fields = (part.count, part.sum, part.sum_sq, part.dots)
    return Moments(*(torch.stack(list(field)) for field in fields))

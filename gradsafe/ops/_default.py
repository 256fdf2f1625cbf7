"""The plain PyTorch definition of every operator.

These functions define what the operators compute. They are the reference of the tests (called with
`dtype=torch.float64`), the eager baseline of the benchmarks (called with the input's own dtype),
and the kernels where the compiled module is missing (`_fallback.py`). They are written to be read,
not to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsafe.ops.cosine_topk import TopK
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
    return _stacked(moments(grads, [list(refs) for _ in grads], axis, unsigned, dtype))


def grouped_wgrad_moments(
    x: Tensor,
    dy: Tensor,
    refs: Sequence[Tensor],
    lengths: Sequence[int],
    experts: Sequence[int],
    axis: Axis = "tensor",
    unsigned: bool = True,
    dtype: torch.dtype | None = torch.float64,
) -> Moments | tuple[Moments, Moments]:
    """What `gradsafe.ops.grouped_wgrad_moments` computes: the gradient of every segment first."""
    if dtype is not None:
        x, dy = x.to(dtype), dy.to(dtype)
    segments = zip(x.split(list(lengths)), dy.split(list(lengths)), strict=True)
    grads = [segment_dy.t() @ segment_x for segment_x, segment_dy in segments]
    own = [[ref[expert] for ref in refs] for expert in experts]
    return _stacked(moments(grads, own, axis, unsigned, dtype))


def cosine_topk(
    queries: Tensor,
    rows: Tensor,
    k: int,
    start: int = 0,
    dtype: torch.dtype | None = torch.float64,
    rounded: torch.dtype | None = None,
) -> TopK:
    """What `gradsafe.ops.cosine_topk` computes, from all Q x N similarities.

    Scores are in `dtype`, or rounded to `rounded` before they are ranked, as in the operator.
    """
    unit_queries, unit_rows = (_unit(m if dtype is None else m.to(dtype)) for m in (queries, rows))
    scores = unit_queries @ unit_rows.t()
    damaged = ~queries.isfinite().all(1)[:, None] | ~rows.isfinite().all(1)
    # Descending and stable: NaN first, then large scores, equal scores by index.
    scores = scores.masked_fill(damaged, torch.nan)
    scores = scores if rounded is None else scores.to(rounded)
    best, indices = scores.sort(dim=1, descending=True, stable=True)
    return TopK(best[:, :k], indices[:, :k] + start)


def _unit(vectors: Tensor) -> Tensor:
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors / torch.where(norms == 0, torch.ones_like(norms), norms)


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


def _stacked(result: Moments | tuple[Moments, Moments]) -> Moments | tuple[Moments, Moments]:
    if isinstance(result, tuple):
        rows, columns = (_stacked(part) for part in result)
        assert isinstance(rows, Moments)
        assert isinstance(columns, Moments)
        return rows, columns
    fields = (result.count, result.sum, result.sum_sq, result.dots)
    return Moments(*(torch.stack(list(field)) for field in fields))


def surgery_sums(
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    groups: Sequence[int] | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """What `gradsafe.ops.surgery_sums` computes, in `dtype` (None: the dtype of each tensor)."""
    numbers = [0] * len(user) if groups is None else groups
    device = user[0].device if user else None
    count = 1 if groups is None else max(numbers, default=-1) + 1
    sums = torch.zeros(count, 3, dtype=torch.float64, device=device)
    for u, a, group in zip(_cast(user, dtype), _cast(align, dtype), numbers, strict=True):
        sums[group] += torch.stack([(u * a).sum(), (u * u).sum(), (a * a).sum()])
    return sums[0] if groups is None else sums


def surgery_merge_(
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    sums: Tensor,
    rho: float = 1.0,
    groups: Sequence[int] | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """What `gradsafe.ops.surgery_merge_` does; in `dtype`, rounded once to each tensor's."""
    results = _surgery_results(sums, rho)
    numbers = [0] * len(user) if groups is None else groups
    rows = results.view(-1, 4)
    merged = _merged(user, align, rows, numbers, dtype)
    for u, new, group in zip(user, merged, numbers, strict=True):
        if not rows[group, 3].isnan():
            u.copy_(new)
    return results


def surgery_(
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    rho: float = 1.0,
    groups: Sequence[int] | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """What `gradsafe.ops.surgery_` does."""
    sums = surgery_sums(user, align, groups, dtype)
    return surgery_merge_(user, align, sums, rho, groups, dtype)


def subspace_surgery_(
    user: Sequence[Tensor],
    basis: Sequence[Tensor],
    direction: Tensor,
    rho: float = 0.0,
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """What `gradsafe.ops.subspace_surgery_` does; in `dtype`, rounded once to each tensor's."""
    pairs = list(zip(_cast(user, dtype), _cast(basis, dtype), strict=True))
    dots, square = torch.zeros_like(direction), direction.new_zeros(())
    for u, vectors in pairs:
        dots += vectors.reshape(len(dots), u.numel()) @ u.flatten()
        square += (u * u).sum()
    conflict = direction @ dots
    coefficients = rho * direction - torch.where(conflict < 0, dots, 0.0)
    if not torch.cat([conflict[None], square[None], coefficients]).isfinite().all():
        conflict, coefficients = conflict * torch.nan, coefficients * torch.nan
    elif coefficients.any():
        for target, (u, vectors) in zip(user, pairs, strict=True):
            target.copy_(u + torch.tensordot(coefficients.to(u.dtype), vectors, 1))
    return torch.cat([conflict[None], square[None], dots, coefficients])


def surgery_adamw_(
    params: Sequence[Tensor],
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Tensor | Sequence[Tensor],
    *,
    rho: float = 1.0,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    groups: Sequence[int] | None = None,
    sums: Tensor | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """What `gradsafe.ops.surgery_adamw_` does; in `dtype`, rounded once to each tensor's."""
    sums = surgery_sums(user, align, groups, dtype) if sums is None else sums
    results = _surgery_results(sums, rho)
    if results[..., 3].isnan().any():
        results[..., 3] = float("nan")
        return results
    steps = [step] if isinstance(step, Tensor) else step
    for counter in steps:
        counter += 1
    numbers = [0] * len(user) if groups is None else groups
    merged = _merged(user, align, results.view(-1, 4), numbers, dtype)
    lists = (params, exp_avg, exp_avg_sq)
    for index, g in enumerate(merged):
        p, m, v = (_cast(tensors, dtype)[index] for tensors in lists)
        t = float(steps[0 if len(steps) == 1 else index])
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        denominator = v.sqrt() / (1 - betas[1] ** t) ** 0.5 + eps
        p = p * (1 - lr * weight_decay) - lr / (1 - betas[0] ** t) * m / denominator
        for tensors, new in zip(lists, (p, m, v), strict=True):
            tensors[index].detach().copy_(new)
    return results


def _surgery_results(sums: Tensor, rho: float) -> Tensor:
    dot, _, sq_align = sums.unbind(-1)
    projection = torch.where(sq_align > 0, dot.clamp(max=0) / sq_align, torch.zeros_like(dot))
    finite = sums.isfinite().all(-1)
    coefficient = torch.where(finite, rho - projection, float("nan"))
    return torch.cat([sums, coefficient.unsqueeze(-1)], -1)


def _merged(
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    results: Tensor,
    numbers: Sequence[int],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    pairs = zip(_cast(user, dtype), _cast(align, dtype), numbers, strict=True)
    return [u + float(results[group, 3]) * a for u, a, group in pairs]


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    return [t.detach() if dtype is None else t.detach().to(dtype) for t in tensors]

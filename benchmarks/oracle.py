"""Compares every benchmark case with its float64 definition on the same device before timing.

Each function returns the largest error divided by its bound; above 1 the result is wrong. The
bounds are those of the tests. U is the float32 rounding unit; "terms" are sums of the absolute
values of the summands, the scale of a sum's rounding error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsafe.ops import Moments, TopK
from gradsafe.ops import _default as reference

U = 2.0**-24
SUM_ULPS = 16  # of `moments`, `wgrad_moments` and the sums of `surgery_`, times the terms
COSINE_ULPS = 24  # absolute: cosines are at most 1
PROBABILITY = 1e-5  # relative error of one softmax probability, and of a divergence
STEP_FLOOR = 4e-6  # absolute, of merged gradients and of AdamW's results
ROWS_AT_ONCE = 256
VECTORS_AT_ONCE = 50_000
SEGMENTS_CHECKED = 64


def share(found: Tensor, wanted: Tensor, bound: Tensor | float) -> float:
    """Largest error divided by its bound; infinite if only one side is NaN or infinite."""
    error = (found.double() - wanted.double()).abs() / bound
    exact = (found == wanted) | (found.isnan() & wanted.isnan())
    error = torch.where(exact, torch.zeros_like(error), error).nan_to_num(
        nan=math.inf, posinf=math.inf
    )
    return float(error.max()) if error.numel() else 0.0


def _parts(result: Moments | tuple[Moments, Moments]) -> list[Moments]:
    return list(result) if isinstance(result, tuple) else [result]


def _moments_share(
    found: Sequence[Moments], wanted: Sequence[Moments], terms: Sequence[Moments], at: int
) -> float:
    worst = 0.0
    for got, want, scale in zip(found, wanted, terms, strict=True):
        for field in ("count", "sum", "sum_sq", "dots"):
            bound = SUM_ULPS * U * getattr(scale, field)[0] + 1e-300
            worst = max(worst, share(getattr(got, field)[at], getattr(want, field)[0], bound))
    return worst


def moments(found: Any, grads: list[Tensor], refs: list[list[Tensor]], axis: Any) -> float:
    """Checks `moments` for a list, one gradient at a time to save memory."""
    worst = 0.0
    for at, (grad, group) in enumerate(zip(grads, refs, strict=True)):
        wanted = reference.moments([grad], [group], axis)
        terms = reference.moments([grad.abs()], [[r.abs() for r in group]], axis)
        worst = max(worst, _moments_share(_parts(found), _parts(wanted), _parts(terms), at))
    return worst


def wgrad_moments(found: Any, x: Tensor, dy: Tensor, refs: list[Tensor], axis: Any) -> float:
    """Checks `wgrad_moments`, one sample at a time."""
    worst = 0.0
    absolute = [r.abs() for r in refs]
    for at in range(len(x)):
        wanted = reference.wgrad_moments(x[at : at + 1], dy[at : at + 1], refs, axis)
        terms = reference.wgrad_moments(x[at : at + 1].abs(), dy[at : at + 1].abs(), absolute, axis)
        worst = max(worst, _moments_share(_parts(found), _parts(wanted), _parts(terms), at))
    return worst


def grouped_wgrad_moments(
    found: Any,
    x: Tensor,
    dy: Tensor,
    refs: list[Tensor],
    lengths: Sequence[int],
    experts: Sequence[int],
    axis: Any,
) -> float:
    """Checks evenly spaced segments of `grouped_wgrad_moments`."""
    worst = 0.0
    starts = [0, *itertools.accumulate(lengths)]
    for at in range(0, len(lengths), max(len(lengths) // SEGMENTS_CHECKED, 1)):
        some = slice(starts[at], starts[at + 1])
        own = [r[experts[at]] for r in refs]
        wanted = reference.wgrad_moments(x[None, some], dy[None, some], own, axis)
        absolute = [r.abs() for r in own]
        terms = reference.wgrad_moments(x[None, some].abs(), dy[None, some].abs(), absolute, axis)
        worst = max(worst, _moments_share(_parts(found), _parts(wanted), _parts(terms), at))
    return worst


def cosine_topk(found: TopK, queries: Tensor, rows: Tensor, k: int) -> float:
    """Checks the k best scores, and that the returned rows have those scores."""
    unit = torch.nn.functional.normalize(queries.double(), dim=1)
    own = torch.full_like(found.scores, math.nan, dtype=torch.float64)
    best = torch.empty(len(queries), 0, dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), VECTORS_AT_ONCE):
        some = torch.nn.functional.normalize(rows[start : start + VECTORS_AT_ONCE].double(), dim=1)
        scores = unit @ some.t()
        here = (found.indices >= start) & (found.indices < start + len(some))
        places = (found.indices - start).clamp(0, len(some) - 1)
        own = torch.where(here, scores.gather(1, places), own)
        best = torch.cat([best, scores.topk(min(k, len(some)), dim=1).values], 1)
    best = best.topk(k, dim=1).values
    twice = (found.indices.sort(1).values.diff(dim=1) == 0).any()
    near = max(share(found.scores, best, COSINE_ULPS * U), share(own, best, COSINE_ULPS * U))
    return math.inf if twice else near


def kl_divergence_(
    found: Tensor, gradient: Tensor, student: Tensor, teacher: Tensor, weight: Tensor
) -> float:
    """Checks divergences and the gradient written over the student's logits, in blocks of rows."""
    worst = 0.0
    for start in range(0, len(student), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        exact = student[some].double()
        probabilities = exact.softmax(1) + teacher[some].double().softmax(1)
        wanted = reference.kl_divergence_(exact, teacher[some], weight[some])
        bound = torch.finfo(student.dtype).eps * exact.abs()
        bound += PROBABILITY * weight[some, None].abs() * probabilities
        bound += torch.finfo(student.dtype).smallest_normal * torch.finfo(student.dtype).eps
        worst = max(worst, share(gradient[some], exact, bound))
        worst = max(worst, share(found[some], wanted, PROBABILITY * (1 + wanted.abs())))
    return worst


def surgery_sums(found: Tensor, user: Sequence[Tensor], align: Sequence[Tensor]) -> float:
    """Checks the three sums that `surgery_` returns before its coefficient."""
    wanted = torch.zeros(3, dtype=torch.float64, device=found.device)
    terms = torch.zeros_like(wanted)
    for u, a in zip(user, align, strict=True):
        wanted += reference.surgery_sums([u], [a])
        terms += reference.surgery_sums([u.abs()], [a.abs()])
    return share(found[:3], wanted, SUM_ULPS * U * terms)


def rounded(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """Checks a rounded tensor; the last bit of a float32 intermediate may change its rounding."""
    bound = torch.finfo(dtype).eps * wanted.double().abs() + STEP_FLOOR
    return share(found, wanted, bound)

"""One call of every operator, for the self-test of `gradsafe doctor`."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from gradsafe import ops

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A case calls one operator of `gradsafe.ops` or its namesake in `gradsafe.ops._default`.
Case = Callable[[ModuleType, str], list[Tensor]]


def _moments(module: ModuleType, device: str) -> list[Tensor]:
    # Odd widths leave a tail behind every vector width; the offset keeps all sums away from zero.
    shapes = [(33, 517), (8, 64), (1, 1031)]
    found = []
    for dtype in _DTYPES:
        grads = [_noise(shape, seed, dtype, device) for seed, shape in enumerate(shapes)]
        refs = [[_noise(shape, seed, dtype, device) for seed in (8, 9)] for shape in shapes]
        rows, columns = module.moments(grads, refs, axis="both")
        found += [*_sums(rows), *_sums(columns), *_sums(module.moments(grads, refs))]
    return found


def _wgrad_moments(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        x, dy = _noise((3, 9, 65), 0, dtype, device), _noise((3, 9, 37), 1, dtype, device)
        lengths = [9, 1, 4]
        for sample, length in enumerate(lengths):  # padding must not be read
            x[sample, length:] = dy[sample, length:] = float("nan")
        refs = [_noise((37, 65), seed, dtype, device) for seed in (8, 9)]
        rows, columns = module.wgrad_moments(x, dy, refs, axis="both", lengths=lengths)
        whole = module.wgrad_moments(x, dy, refs, lengths=lengths)
        found += [*_sums(rows), *_sums(columns), *_sums(whole)]
    return found


def _grouped_wgrad_moments(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        x, dy = _noise((14, 65), 0, dtype, device), _noise((14, 37), 1, dtype, device)
        refs = [_noise((4, 37, 65), seed, dtype, device) for seed in (8, 9)]
        for ref in refs:  # an expert without a segment must not be read
            ref[1] = float("nan")
        segments = [9, 1, 4], [2, 3, 2]
        rows, columns = module.grouped_wgrad_moments(x, dy, refs, *segments, axis="both")
        whole = module.grouped_wgrad_moments(x, dy, refs, *segments)
        found += [*_sums(rows), *_sums(columns), *_sums(whole)]
    return found


def _cosine_topk(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        queries, rows = _noise((5, 517), 0, dtype, device), _noise((131, 517), 1, dtype, device)
        rows[7] = 0
        found += [*module.cosine_topk(queries, rows, 9, start=3)]
        found += [*module.cosine_topk(queries, rows.float(), 131)]
    return found


def _surgery(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        user, align = _conflict(dtype, device)
        found.append(module.surgery_(user, align, 0.5))
        # A 16-bit rounding may fall either way on the last bit of the coefficient.
        found += user if dtype == torch.float32 else []
    return found


def _surgery_sums(module: ModuleType, device: str) -> list[Tensor]:
    return [module.surgery_sums(*_conflict(dtype, device), [0, 1, 0]) for dtype in _DTYPES]


def _surgery_merge(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        user, align = _conflict(dtype, device)
        sums = torch.tensor([-2.0, 3.0, 4.0], dtype=torch.float64, device=device)
        found += [module.surgery_merge_(user, align, sums, 0.5), *user]
    return found


def _surgery_adamw(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        user, align = _conflict(dtype, device)
        exact = dtype != torch.float32  # 16 bits: no value that could round either way
        if exact:
            user, align = ([(4 * t).round() / 4 for t in tensors] for tensors in (user, align))
        sums = torch.tensor([-2.0, 3.0, 4.0], dtype=torch.float64, device=device)
        params = [torch.ones_like(u) for u in user]
        first, second = [u / 2 for u in user], [torch.ones_like(u) for u in user]
        step = torch.full((), 3.0, device=device)
        options = {"lr": 0.0, "betas": (0.5, 0.5)} if exact else {"lr": 0.1}
        result = module.surgery_adamw_(
            params, user, align, first, second, step, rho=0.5, sums=sums, **options
        )
        found += [result, *params, *first, *second, step]
    return found


def _conflict(dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients with a negative dot product; one is longer than a tile, others end inside one."""
    shapes = [(33, 1031), (5,), (8, 64)]
    user = [_noise(shape, seed, dtype, device) for seed, shape in enumerate(shapes)]
    return user, [-_noise(shape, 8, dtype, device) for shape in shapes]


def _kl_divergence(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        student, teacher = (_noise((5, 1031), seed, dtype, device) for seed in (0, 1))
        teacher[1, ::3] = -math.inf  # a masked vocabulary
        found.append(module.kl_divergence(student, teacher))
    return found


def _kl_divergence_(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        student = _noise((5, 1031), 0, torch.float32, device)
        teacher, weight = _noise((5, 1031), 1, dtype, device), torch.arange(5.0, device=device)
        found += [module.kl_divergence_(student, teacher, weight), student]
    return found


def _sums(result: ops.Moments) -> list[Tensor]:
    return [*result.count, *result.sum, *result.sum_sq, *result.dots]


def _noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.5).to(device, dtype)


CASES: dict[str, Case] = {
    "moments": _moments,
    "cosine_topk": _cosine_topk,
    "grouped_wgrad_moments": _grouped_wgrad_moments,
    "kl_divergence": _kl_divergence,
    "kl_divergence_": _kl_divergence_,
    "surgery_": _surgery,
    "surgery_adamw_": _surgery_adamw,
    "surgery_merge_": _surgery_merge,
    "surgery_sums": _surgery_sums,
    "wgrad_moments": _wgrad_moments,
}

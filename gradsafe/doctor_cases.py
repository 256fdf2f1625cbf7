"""One call of every operator, for the self-test of `gradsafe doctor`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Calls an operator of `gradsafe.ops`, or its definition of the same name in `ops._default`,
# and returns its results and what it wrote.
Case = Callable[[ModuleType, str], list[Tensor]]
# Arguments, options, and those arguments that are compared because the operator writes them.
Call = tuple[list[Any], dict[str, Any], list[Tensor]]


def _noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    # The offset keeps all sums away from zero.
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.5).to(device, dtype)


def _moments(*on: Any) -> Iterator[Call]:
    shapes = [(33, 517), (8, 64), (1, 1031)]  # odd widths leave a tail behind every vector width
    grads = [_noise(shape, seed, *on) for seed, shape in enumerate(shapes)]
    refs = [[_noise(shape, seed, *on) for seed in (8, 9)] for shape in shapes]
    for axis in ("both", "tensor"):
        yield [grads, refs], {"axis": axis}, []


def _wgrad_moments(*on: Any) -> Iterator[Call]:
    x, dy, lengths = _noise((3, 9, 65), 0, *on), _noise((3, 9, 37), 1, *on), [9, 1, 4]
    for sample, length in enumerate(lengths):  # padding must not be read
        x[sample, length:] = dy[sample, length:] = math.nan
    refs = [_noise((37, 65), seed, *on) for seed in (8, 9)]
    for axis in ("both", "tensor"):
        yield [x, dy, refs], {"axis": axis, "lengths": lengths}, []


def _grouped_wgrad_moments(*on: Any) -> Iterator[Call]:
    x, dy = _noise((14, 65), 0, *on), _noise((14, 37), 1, *on)
    refs = [_noise((4, 37, 65), seed, *on) for seed in (8, 9)]
    for ref in refs:  # an expert without a segment must not be read
        ref[1] = math.nan
    for axis in ("both", "tensor"):
        yield [x, dy, refs, [9, 1, 4], [2, 3, 2]], {"axis": axis}, []


def _cosine_topk(*on: Any) -> Iterator[Call]:
    queries, rows = _noise((5, 517), 0, *on), _noise((131, 517), 1, *on)
    rows[7] = 0
    yield [queries, rows, 9], {"start": 3}, []
    yield [queries, rows.float(), 131], {}, []


def _kl_divergence(*on: Any) -> Iterator[Call]:
    student, teacher = (_noise((5, 1031), seed, *on) for seed in (0, 1))
    teacher[1, ::3] = -math.inf  # a masked vocabulary
    yield [student, teacher], {}, []


def _kl_divergence_(dtype: torch.dtype, device: str) -> Iterator[Call]:
    student = _noise((5, 1031), 0, torch.float32, device)
    teacher, weight = _noise((5, 1031), 1, dtype, device), torch.arange(5.0, device=device)
    yield [student, teacher, weight], {}, [student]


def _conflict(*on: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients with a negative dot product; one is longer than a tile, others end inside one."""
    shapes = [(33, 1031), (5,), (8, 64)]
    user = [_noise(shape, seed, *on) for seed, shape in enumerate(shapes)]
    return user, [-_noise(shape, 8, *on) for shape in shapes]


def _sums(device: str) -> Tensor:
    return torch.tensor([-2.0, 3.0, 4.0], dtype=torch.float64, device=device)


def _surgery_(dtype: torch.dtype, device: str) -> Iterator[Call]:
    user, align = _conflict(dtype, device)
    # A 16-bit rounding may fall either way on the last bit of the coefficient.
    yield [user, align, 0.5], {}, user if dtype == torch.float32 else []


def _surgery_sums(*on: Any) -> Iterator[Call]:
    yield [*_conflict(*on), [0, 1, 0]], {}, []


def _surgery_merge_(dtype: torch.dtype, device: str) -> Iterator[Call]:
    user, align = _conflict(dtype, device)
    yield [user, align, _sums(device), 0.5], {}, user


def _subspace_surgery_(dtype: torch.dtype, device: str) -> Iterator[Call]:
    user, align = _conflict(dtype, device)
    # Two vectors of disjoint parts; exact in 16 bits, or a rounding could fall either way.
    basis = [torch.stack([u > 0.5, u < -0.5]).to(dtype) / 256 for u in align]
    direction = torch.tensor([-3.0, 1.0], dtype=torch.float64, device=device)
    yield [user, basis, direction, 0.5], {}, user if dtype == torch.float32 else []


def _surgery_adamw_(dtype: torch.dtype, device: str) -> Iterator[Call]:
    user, align = _conflict(dtype, device)
    options: dict[str, Any] = {"lr": 0.1}
    if dtype != torch.float32:  # 16 bits: no value that could round either way
        user, align = ([(4 * t).round() / 4 for t in tensors] for tensors in (user, align))
        options = {"lr": 0.0, "betas": (0.5, 0.5)}
    params = [torch.ones_like(u) for u in user]
    first, second = [u / 2 for u in user], [torch.ones_like(u) for u in user]
    step = torch.full((), 3.0, device=device)
    options |= {"rho": 0.5, "sums": _sums(device)}
    yield (
        [params, user, align, first, second, step],
        options,
        [*params, *first, *second, step],
    )


def _run(name: str, calls: Callable[..., Iterator[Call]], module: ModuleType, device: str) -> Any:
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for arguments, options, written in calls(dtype, device):
            found += [*_tensors(getattr(module, name)(*arguments, **options)), *written]
    return found


def _tensors(result: Any) -> list[Tensor]:
    """All tensors of a result: a tensor, `Moments`, or a list or tuple of these."""
    if isinstance(result, Tensor):
        return [result]
    parts = result if isinstance(result, (list, tuple)) else vars(result).values()
    return [tensor for part in parts for tensor in _tensors(part)]


CASES: dict[str, Case] = {
    calls.__name__[1:]: partial(_run, calls.__name__[1:], calls)
    for calls in (
        _moments, _cosine_topk, _grouped_wgrad_moments, _kl_divergence, _kl_divergence_, _surgery_,
        _subspace_surgery_, _surgery_adamw_, _surgery_merge_, _surgery_sums, _wgrad_moments,
    )
}  # fmt: skip

"""Kernels made from the plain definitions, where the compiled module is not in use.

They compute in float64, so values whose squares overflow float32 stay finite here. The last bits
may depend on the number of threads, and temporary buffers are as large as a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradsafe._backend import fallback_reason
from gradsafe._fallback import announce_fallback
from gradsafe.ops import _default as plain
from gradsafe.ops.moments import AXES, out_size

_library = torch.library.Library("gradsafe", "IMPL")  # kept: its registrations end with it


def _moments(
    grads: list[Tensor], refs: list[Tensor], num_refs: int, axis: int, unsigned: bool
) -> Tensor:
    groups = [refs[n * num_refs : (n + 1) * num_refs] for n in range(len(grads))]
    found = plain.moments(grads, groups, AXES[axis], unsigned)
    parts = found if isinstance(found, tuple) else (found,)
    fields = [(part.count, part.sum, part.sum_sq, part.dots) for part in parts]
    return torch.cat([f[n].flatten() for n in range(len(grads)) for four in fields for f in four])


def _wgrad_moments(
    x: Tensor, dy: Tensor, refs: list[Tensor], lengths: list[int], axis: int, unsigned: bool
) -> Tensor:
    sizes = lengths or [x.shape[1]] * len(x)
    samples = ((x[b, :size], dy[b, :size], refs) for b, size in enumerate(sizes))
    size = out_size(axis, len(refs), dy.shape[-1], x.shape[-1])
    return _products(samples, x.device, size, axis, unsigned)


def _grouped_wgrad_moments(
    x: Tensor, dy: Tensor, refs: list[Tensor], lengths: list[int], experts: list[int], *rest: Any
) -> Tensor:
    own = ([ref[expert] for ref in refs] for expert in experts)
    segments = zip(x.split(lengths), dy.split(lengths), own, strict=True)
    size = out_size(rest[0], len(refs), dy.shape[-1], x.shape[-1])
    return _products(segments, x.device, size, *rest)


def _products(
    factors: Iterable[tuple[Tensor, Tensor, list[Tensor]]],
    device: torch.device,
    size: int,
    axis: int,
    unsigned: bool,
) -> Tensor:
    """A row of `size` results for every gradient dy^T x, one gradient in memory at a time."""
    rows = [torch.empty((0, size), dtype=torch.float64, device=device)]
    for x, dy, refs in factors:
        grad = dy.double().t() @ x.double()
        rows.append(_moments([grad], refs, len(refs), axis, unsigned)[None])
    return torch.cat(rows)


def _cosine_topk(queries: Tensor, rows: Tensor, k: int, start: int) -> tuple[Tensor, Tensor]:
    scores, indices = plain.cosine_topk(queries, rows, k, start, rounded=torch.float32)
    return scores.contiguous(), indices.contiguous()


def _surgery_merge_(
    user: list[Tensor], align: list[Tensor], sums: Tensor, rho: float, groups: list[int]
) -> Tensor:
    _refuse_shared_memory(user, align)
    return plain.surgery_merge_(user, align, sums, rho, groups or None)


def _surgery_(
    user: list[Tensor], align: list[Tensor], rho: float, groups: list[int], num_groups: int
) -> Tensor:
    _refuse_shared_memory(user, align)
    return plain.surgery_(user, align, rho, groups or None).view(num_groups, 4)


def _subspace_surgery_(
    user: list[Tensor], basis: list[Tensor], direction: Tensor, rho: float
) -> Tensor:
    _refuse_shared_memory(user, [*basis, direction])
    return plain.subspace_surgery_(user, basis, direction, rho)


def _surgery_adamw_(
    params: list[Tensor],
    user: list[Tensor],
    align: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    sums: Tensor | None,
    *numbers: Any,
) -> Tensor:
    _refuse_shared_memory([*params, *exp_avg, *exp_avg_sq, *steps], [*user, *align])
    rho, lr, beta1, beta2, eps, weight_decay, groups, num_groups = numbers
    options = {"rho": rho, "lr": lr, "betas": (beta1, beta2), "eps": eps, "sums": sums}
    options |= {"weight_decay": weight_decay, "groups": groups or None}
    out = plain.surgery_adamw_(params, user, align, exp_avg, exp_avg_sq, steps, **options)
    return out.view(num_groups, 4)


def _refuse_shared_memory(written: list[Tensor], read: list[Tensor]) -> None:
    """No memory that is written may belong to two tensors; each fills its own without gaps."""
    spans = [
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), writes)
        for tensors, writes in ((written, True), (read, False))
        for t in tensors
        if t.numel()
    ]
    end_of_any = end_of_written = 0
    for begin, end, writes in sorted(spans):
        if begin < (end_of_any if writes else end_of_written):
            raise RuntimeError("gradsafe: expected tensors that are written not to share memory")
        end_of_any = max(end_of_any, end)
        end_of_written = max(end_of_written, end) if writes else end_of_written


def _announced(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @torch.no_grad()
    def run(*args: Any) -> Any:
        announce_fallback(
            "gradsafe: the operators run as their plain PyTorch definitions, which are slower and "
            f"use more memory: {fallback_reason}"
        )
        return kernel(*args)

    return run


_KERNELS: dict[str, Callable[..., Any]] = {
    "moments": _moments,
    "wgrad_moments": _wgrad_moments,
    "grouped_wgrad_moments": _grouped_wgrad_moments,
    "cosine_topk": _cosine_topk,
    "kl_divergence": lambda *args: plain.kl_divergence(*args).float(),
    "kl_divergence_": lambda *args: plain.kl_divergence_(*args).float(),
    "surgery_sums": lambda user, align, groups, num_groups: plain.surgery_sums(
        user, align, groups or None
    ).view(num_groups, 3),
    "surgery_merge_": _surgery_merge_,
    "surgery_": _surgery_,
    "surgery_adamw_": _surgery_adamw_,
    "subspace_surgery_": _subspace_surgery_,
}
for _name, _kernel in _KERNELS.items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _announced(_kernel), _key)

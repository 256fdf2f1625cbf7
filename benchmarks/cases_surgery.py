"""Cases of `surgery_` and `surgery_adamw_`: alternatives, and bytes that must be moved."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import oracle
from benchmarks.plan import Alternatives, Plan
from gradsafe.ops import _default as reference
from gradsafe.ops import surgery_, surgery_adamw_


@dataclass(frozen=True)
class Case:
    """A list of equal tensors."""

    name: str
    shape: tuple[int, int]
    tensors: int
    dtype: torch.dtype

    @property
    def bytes_of_list(self) -> int:
        return self.tensors * self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def bytes_moved(self) -> int:
        """Bytes if both gradients are read twice and one is written."""
        return 5 * self.bytes_of_list

    @property
    def bytes_adamw(self) -> int:
        """Bytes if both gradients are read twice, parameter and both moments read and written."""
        return 10 * self.bytes_of_list


F32, BF16 = torch.float32, torch.bfloat16
CPU_CASES = [
    Case("200 tensors, 85 M, fp32", (512, 830), 200, F32),
    Case("200 tensors, 85 M, bf16", (512, 830), 200, BF16),
    Case("64 LoRA, 1 M, fp32", (8, 2048), 64, F32),
]
GPU_CASES = [
    Case("64 x [4096, 4096], 1.1 G, bf16", (4096, 4096), 64, BF16),
    Case("32 x [4096, 4096], 0.5 G, fp32", (4096, 4096), 32, F32),
    Case("448 LoRA, 15 M, bf16", (8, 4096), 448, BF16),
]


def cat(user: list[Tensor], align: list[Tensor], rho: float = 1.0) -> None:
    """The usual form: flatten both lists, vector operations, copy back."""
    u = torch.cat([t.reshape(-1) for t in user])
    a = torch.cat([t.reshape(-1) for t in align])
    dot, sq_align = (u * a).sum(), (a * a).sum()
    if dot < 0:
        u = u - dot / sq_align * a
    u = u + rho * a
    for target, part in zip(user, u.split([t.numel() for t in user]), strict=True):
        target.copy_(part.view_as(target))


def foreach(user: list[Tensor], align: list[Tensor], rho: float = 1.0) -> None:
    """The best PyTorch form: two dot products per tensor, one sync, one addition per list."""
    pairs = [(u.reshape(-1), a.reshape(-1)) for u, a in zip(user, align, strict=True)]
    dots = torch.stack([torch.stack([torch.dot(u, a), torch.dot(a, a)]) for u, a in pairs])
    dot, sq_align = dots.double().sum(0).tolist()
    torch._foreach_add_(user, align, alpha=rho - min(dot, 0.0) / sq_align)


def gradients(case: Case, device: str) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """User gradients, and alignment gradients that conflict with them at every call.

    After a merge the two gradients agree, so the sign of the alignment gradient alternates.
    """
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": case.dtype}

    def some() -> list[Tensor]:
        return [torch.randn(case.shape, **options) for _ in range(case.tensors)]

    align = some()
    signs = itertools.cycle([align, [-a for a in align]])
    return some(), lambda: next(signs)


def copy_roof(tensors: list[Tensor], lists_moved: int) -> Callable[[], None]:
    """A copy that reads and writes `lists_moved` times the bytes of the list."""
    targets = [torch.empty_like(t) for t in tensors]
    half = len(tensors) // 2

    def copy() -> None:
        for _ in range(lists_moved // 2):
            for a, b in zip(targets, tensors, strict=True):
                a.copy_(b)
        if lists_moved % 2:
            for a, b in zip(targets[:half], tensors[:half], strict=True):
                a.copy_(b)

    return copy


def build(case: Case, device: str) -> Plan:
    """Alternatives of one case of `surgery_`."""
    user, align = gradients(case, device)
    calls: Alternatives = {
        "gradsafe": lambda: surgery_(user, align()),
        "cat": lambda: cat(user, align()),
        "foreach": lambda: foreach(user, align()),
    }

    def check() -> float:
        merged, against = [u.clone() for u in user], align()
        result = surgery_(merged, against)
        worst = oracle.surgery_sums(result, user, against)
        for got, u, a in zip(merged, user, against, strict=True):
            wanted = u.double()
            reference.surgery_merge_([wanted], [a], result[:3])
            worst = max(worst, oracle.rounded(got, wanted, case.dtype))
        return worst

    return Plan(calls, {"copy": copy_roof(user, 5)}, check)


def build_adamw(case: Case, device: str) -> Plan:
    """Alternatives of one case of `surgery_adamw_`."""
    user, align = gradients(case, device)
    params = [torch.randn_like(u).requires_grad_() for u in user]
    for p, u in zip(params, user, strict=True):
        p.grad = u
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    optimizer.step()
    states = [optimizer.state[p] for p in params]
    first, second, steps = (
        [state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")
    )

    def then_step(merge: Callable[[list[Tensor], list[Tensor]], object]) -> Callable[[], object]:
        def call() -> None:
            merge(user, align())
            optimizer.step()

        return call

    calls: Alternatives = {
        "gradsafe": lambda: surgery_adamw_(params, user, align(), first, second, steps, lr=1e-4),
        "fused": optimizer.step,
        "two": then_step(surgery_),
        "foreach": then_step(foreach),
    }

    def check() -> float:
        against = align()
        lists = (params, first, second)
        got = [[t.detach().clone() for t in tensors] for tensors in lists]
        counters = [t.clone() for t in steps]
        result = surgery_adamw_(got[0], user, against, got[1], got[2], counters, lr=1e-4)
        worst = oracle.surgery_sums(result, user, against)
        for at, (u, a) in enumerate(zip(user, against, strict=True)):
            wanted = [tensors[at].detach().double() for tensors in lists]
            p, m, v = ([t] for t in wanted)
            counter = steps[at].clone()
            reference.surgery_adamw_(p, [u], [a], m, v, counter, lr=1e-4, sums=result[:3])
            shares = [
                oracle.rounded(g[at], w, case.dtype) for g, w in zip(got, wanted, strict=True)
            ]
            worst = max(worst, *shares, oracle.share(counters[at], counter, 1.0))
        return worst

    return Plan(calls, {"copy": copy_roof(user, 10)}, check)

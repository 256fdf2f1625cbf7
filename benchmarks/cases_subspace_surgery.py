"""Cases of `subspace_surgery_`: alternatives, and bytes that must be moved."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import cases_surgery, oracle
from benchmarks.cases_surgery import BF16, F32, copy_roof
from benchmarks.plan import Alternatives, Plan
from gradsafe.ops import _default as reference
from gradsafe.ops import subspace_surgery_, surgery_

RHO = 0.5


@dataclass(frozen=True)
class Case(cases_surgery.Case):
    """A list of equal tensors and `rank` vectors over it."""

    rank: int

    @property
    def bytes_moved(self) -> int:
        """Bytes if the gradient and every vector are read twice and the gradient is written."""
        return (2 * self.rank + 3) * self.bytes_of_list


CPU_CASES = [
    Case("40 tensors, 17 M, k 1, fp32", (512, 830), 40, F32, 1),
    Case("40 tensors, 17 M, k 8, fp32", (512, 830), 40, F32, 8),
    Case("40 tensors, 17 M, k 8, bf16", (512, 830), 40, BF16, 8),
    Case("64 LoRA, 1 M, k 10, fp32", (8, 2048), 64, F32, 10),
]
GPU_CASES = [
    Case("32 x [4096, 4096], k 8, bf16", (4096, 4096), 32, BF16, 8),
    Case("448 LoRA, 15 M, k 10, bf16", (8, 4096), 448, BF16, 10),
]
Inputs = tuple[list[Tensor], list[Tensor], Tensor]


def inputs(case: Case, device: str) -> Inputs:
    """Gradients, vectors, and a direction that the gradients oppose.

    The vectors are random with the norm of orthonormal ones: time does not depend on the angles.
    """
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": case.dtype}
    scale = (case.tensors * case.shape[0] * case.shape[1]) ** -0.5
    user = [torch.randn(case.shape, **options) for _ in range(case.tensors)]
    basis = [torch.randn((case.rank, *case.shape), **options) * scale for _ in user]

    zero = torch.zeros(case.rank, dtype=torch.float64, device=device)
    dots = subspace_surgery_(user, basis, zero)[2 : 2 + case.rank]
    return user, basis, -dots


def matmul(user: list[Tensor], basis: list[Tensor], direction: Tensor, rho: float = RHO) -> None:
    """The plain form: flatten, two products with the matrix of vectors, copy back."""
    u = torch.cat([t.reshape(-1) for t in user])
    vectors = torch.cat([b.reshape(len(direction), -1) for b in basis], 1)
    dots = vectors @ u
    along = direction.to(u.dtype)
    coefficients = rho * along - torch.where(dots @ along < 0, dots, 0)
    u = torch.addmv(u, vectors.t(), coefficients)
    for target, part in zip(user, u.split([t.numel() for t in user]), strict=True):
        target.copy_(part.view_as(target))


def each(user: list[Tensor], basis: list[Tensor], direction: Tensor, rho: float = RHO) -> None:
    """Without the copies: two products for every tensor."""
    pairs = [(u.view(-1), b.view(len(direction), -1)) for u, b in zip(user, basis, strict=True)]
    dots = torch.stack([vectors @ u for u, vectors in pairs]).double().sum(0)
    coefficients = rho * direction - torch.where(direction @ dots < 0, dots, 0)
    along = coefficients.to(user[0].dtype)
    for u, vectors in pairs:
        u.addmv_(vectors.t(), along)


def build(case: Case, device: str) -> Plan:
    """Alternatives of one case."""
    user, basis, direction = inputs(case, device)
    align = [b[0] for b in basis]
    # After a projection nothing is opposed any more; with the other sign the next call is.
    signs = itertools.cycle([direction, -direction])
    calls: Alternatives = {
        "gradsafe": lambda: subspace_surgery_(user, basis, next(signs), RHO),
        "each": lambda: each(user, basis, next(signs)),
        "matmul": lambda: matmul(user, basis, next(signs)),
        "surgery_": lambda: surgery_(user, align, 1e-3),
    }

    def check() -> float:
        merged, along = [u.clone() for u in user], next(signs)
        result = subspace_surgery_(merged, basis, along, RHO)
        sums = slice(1, 2 + case.rank)
        wanted = reference.subspace_surgery_([u.double() for u in user], basis, along, RHO)
        terms = reference.subspace_surgery_(
            [u.abs() for u in user], [b.abs() for b in basis], along.abs()
        )
        bound = oracle.SUM_ULPS * oracle.U * terms[sums]
        worst = oracle.share(result[sums], wanted[sums], bound)
        for got, u, vectors in zip(merged, user, basis, strict=True):
            added = result[2 + case.rank :].view(-1, 1, 1) * vectors.double()
            exact = u.double() + added.sum(0)
            bound = torch.finfo(case.dtype).eps * exact.abs()
            bound += (case.rank + 2) * oracle.U * (u.double().abs() + added.abs().sum(0))
            worst = max(worst, oracle.share(got, exact, bound))
        return worst

    return Plan(calls, {"copy": copy_roof(user, 2 * case.rank + 3)}, check)

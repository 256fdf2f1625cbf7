"""Cases of `cosine_topk`: alternatives and the amount of work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks import oracle
from benchmarks.plan import Alternatives, Plan
from gradsafe.ops import cosine_topk

LOOP_PAIRS = 2000  # timed pairs of the loop; its time is scaled to all pairs


@dataclass(frozen=True)
class Case:
    """Q queries against N rows of D features."""

    name: str
    queries: int
    rows: int
    features: int
    k: int
    dtype: torch.dtype

    @property
    def pairs(self) -> int:
        """Number of cosines."""
        return self.queries * self.rows

    @property
    def flops(self) -> int:
        """Multiplications and additions of the dot products."""
        return 2 * self.pairs * self.features

    @property
    def bytes_read(self) -> int:
        """Bytes of queries and rows, each read once."""
        return (self.queries + self.rows) * self.features * self.dtype.itemsize


F32, BF16 = torch.float32, torch.bfloat16

CPU_CASES = [
    Case("500 x 5000, D 2048, k 10 fp32", 500, 5000, 2048, 10, F32),
    Case("500 x 5000, D 2048, k 10 bf16", 500, 5000, 2048, 10, BF16),
    Case("500 x 5000, D 2048, k 100 fp32", 500, 5000, 2048, 100, F32),
    Case("1 x 50000, D 2048, k 10 fp32", 1, 50_000, 2048, 10, F32),
    Case("16 x 50000, D 2048, k 10 bf16", 16, 50_000, 2048, 10, BF16),
    Case("500 x 50000, D 64, k 10 fp32", 500, 50_000, 64, 10, F32),
]
GPU_CASES = [
    Case("500 x 5000, D 8192, k 10 fp32", 500, 5000, 8192, 10, F32),
    Case("500 x 5000, D 8192, k 10 bf16", 500, 5000, 8192, 10, BF16),
    Case("500 x 500000, D 2048, k 100 bf16", 500, 500_000, 2048, 100, BF16),
    Case("1 x 500000, D 2048, k 10 bf16", 1, 500_000, 2048, 10, BF16),
]


def eager(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Normalise, multiply, select; stores the Q x N matrix."""
    normalize = torch.nn.functional.normalize
    values, indices = (normalize(queries, dim=1) @ normalize(rows, dim=1).t()).topk(k)
    return values, indices


def pair_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """One pair as in RepT's released code: three reductions in NumPy."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def loop(queries: np.ndarray, rows: np.ndarray, pairs: int) -> list[float]:
    """The first `pairs` pairs, one after the other."""
    count = len(rows)
    return [pair_cosine(queries[i // count], rows[i % count]) for i in range(pairs)]


def build(case: Case, device: str) -> Plan:
    """Alternatives of one case; "loop" runs LOOP_PAIRS pairs only."""
    generator = torch.Generator(device).manual_seed(0)

    def matrix(count: int) -> Tensor:
        shape = (count, case.features)
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    queries, rows = matrix(case.queries), matrix(case.rows)
    compiled = torch.compile(eager, dynamic=False)
    calls: Alternatives = {
        "gradsafe": lambda: cosine_topk(queries, rows, case.k),
        "eager": lambda: eager(queries, rows, case.k),
        "compile": lambda: compiled(queries, rows, case.k),
    }
    if device == "cpu":
        few = min(case.rows, LOOP_PAIRS)
        wide = queries.float().numpy(), rows[:few].float().numpy()
        pairs = min(case.pairs, LOOP_PAIRS)
        calls["loop"] = lambda: loop(*wide, pairs)
    store = torch.empty(case.queries, case.rows, dtype=case.dtype, device=device)
    target = torch.empty_like(rows)
    roofs: Alternatives = {
        "gemm": lambda: torch.mm(queries, rows.t(), out=store),
        "read": lambda: rows.sum(),
        "copy": lambda: target.copy_(rows),
    }

    def check() -> float:
        return oracle.cosine_topk(cosine_topk(queries, rows, case.k), queries, rows, case.k)

    return Plan(calls, roofs, check)

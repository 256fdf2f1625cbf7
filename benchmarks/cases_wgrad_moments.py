"""Cases of `wgrad_moments`: alternatives and the amount of work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import oracle
from benchmarks.plan import Alternatives, Plan
from gradsafe.ops import Axis, wgrad_moments


@dataclass(frozen=True)
class Case:
    """A batch of samples of one linear layer [O, I] with K bfloat16 references."""

    name: str
    samples: int
    tokens: int
    shape: tuple[int, int]
    refs: int
    axis: Axis
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """Multiplications and additions of the weight gradients."""
        return 2 * self.samples * self.tokens * self.shape[0] * self.shape[1]

    @property
    def bytes_read(self) -> int:
        """Bytes of factors and references, each read once."""
        factors = self.samples * self.tokens * sum(self.shape) * self.dtype.itemsize
        return factors + 2 * self.refs * self.shape[0] * self.shape[1]


F32, BF16 = torch.float32, torch.bfloat16
MLP = (2048, 5632)

CPU_CASES = [
    Case("8 x 64 tokens tensor fp32", 8, 64, MLP, 2, "tensor", F32),
    Case("8 x 64 tokens tensor bf16", 8, 64, MLP, 2, "tensor", BF16),
    Case("8 x 64 tokens both fp32", 8, 64, MLP, 2, "both", F32),
    Case("8 x 16 tokens tensor fp32", 8, 16, MLP, 2, "tensor", F32),
    Case("1 x 64 tokens tensor fp32", 1, 64, MLP, 2, "tensor", F32),
    Case("2 x 256 tokens tensor fp32", 2, 256, MLP, 2, "tensor", F32),
    Case("8 x 1 token tensor fp32", 8, 1, MLP, 2, "tensor", F32),
]
GPU_CASES = [
    Case("8 x 100 tokens tensor bf16, 7B mlp", 8, 100, (4096, 11008), 2, "tensor", BF16),
    Case("8 x 100 tokens both bf16, 7B mlp", 8, 100, (4096, 11008), 2, "both", BF16),
    Case("16 x 64 tokens tensor bf16, 7B attention", 16, 64, (4096, 4096), 2, "tensor", BF16),
    Case("1 x 100 tokens tensor bf16, 7B mlp", 1, 100, (4096, 11008), 2, "tensor", BF16),
]


def eager(x: Tensor, dy: Tensor, refs: list[Tensor], axis: Axis) -> list[Tensor]:
    """Weight gradients by the library's GEMM, then straightforward eager scoring."""
    out = []
    dims = {"tensor": [(0, 1)], "row": [(1,)], "column": [(0,)], "both": [(1,), (0,)]}[axis]
    for sample_x, sample_dy in zip(x, dy, strict=True):
        normalized = sample_dy.t() @ sample_x
        normalized = (normalized / normalized.std(correction=0)).abs()
        products = [normalized * r for r in refs]
        out += [p.sum(dim) for p in products for dim in dims]
    return out


def build(case: Case, device: str) -> Plan:
    """Alternatives of one case."""
    generator = torch.Generator(device).manual_seed(0)
    rows, cols = case.shape

    def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x = tensor(case.samples, case.tokens, cols, dtype=case.dtype)
    dy = tensor(case.samples, case.tokens, rows, dtype=case.dtype)
    refs = [tensor(rows, cols, dtype=BF16) for _ in range(case.refs)]
    compiled = torch.compile(eager, dynamic=False)
    calls: Alternatives = {
        "gradsafe": lambda: wgrad_moments(x, dy, refs, case.axis),
        "eager": lambda: eager(x, dy, refs, case.axis),
        "compile": lambda: compiled(x, dy, refs, case.axis),
    }
    transposed = dy.transpose(1, 2)
    store = torch.empty(case.samples, rows, cols, dtype=case.dtype, device=device)
    roofs: Alternatives = {"gemm": lambda: torch.bmm(transposed, x, out=store)}
    return Plan(
        calls, roofs, lambda: oracle.wgrad_moments(calls["gradsafe"](), x, dy, refs, case.axis)
    )

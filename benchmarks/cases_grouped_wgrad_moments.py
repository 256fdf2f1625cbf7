"""Cases of `grouped_wgrad_moments`: fused experts of known models, and the alternatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks import oracle
from benchmarks.plan import Alternatives, Plan
from gradsafe.ops import Axis, grouped_wgrad_moments

STORED = 64  # gradients that the bare grouped GEMM stores at a time


@dataclass(frozen=True)
class Case:
    """One fused weight [E, O, I] of a mixture of experts with two bfloat16 references.

    Every token is routed to `top` of E random experts; only the first `kept` experts and their
    tokens are used.
    """

    name: str
    experts: int
    kept: int
    top: int
    shape: tuple[int, int]
    axis: Axis
    dtype: torch.dtype
    samples: int = 8
    tokens: int = 64
    refs: int = 2

    def segments(self) -> tuple[list[int], list[int]]:
        """Lengths and experts of the segments, sorted by sample, then expert."""
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(self.samples, self.tokens, self.experts, generator=generator)
        chosen = scores.topk(self.top).indices.flatten(1)
        lengths, experts = [], []
        for sample in chosen:
            counts = sample.bincount(minlength=self.experts)[: self.kept].tolist()
            experts += [expert for expert, count in enumerate(counts) if count]
            lengths += [count for count in counts if count]
        return lengths, experts

    @property
    def flops(self) -> int:
        """Multiplications and additions of the weight gradients."""
        return 2 * sum(self.segments()[0]) * self.shape[0] * self.shape[1]

    @property
    def bytes_read(self) -> int:
        """Bytes of factors and references, each read once."""
        factors = sum(self.segments()[0]) * sum(self.shape) * self.dtype.itemsize
        return factors + 2 * self.refs * self.kept * self.shape[0] * self.shape[1]


F32, BF16 = torch.float32, torch.bfloat16
QWEN_UP, QWEN_DOWN = (1536, 2048), (2048, 768)
GPT_UP, GPT_DOWN = (5760, 2880), (2880, 2880)

# The loop's gradients and references of all experts would take minutes and tens of gigabytes.
CPU_CASES = [
    Case("Qwen3-30B-A3B gate_up, 8 of 128 experts, fp32", 128, 8, 8, QWEN_UP, "tensor", F32),
    Case("Qwen3-30B-A3B gate_up, 8 of 128 experts, bf16", 128, 8, 8, QWEN_UP, "tensor", BF16),
    Case("Qwen3-30B-A3B gate_up, 8 of 128, both, fp32", 128, 8, 8, QWEN_UP, "both", F32),
    Case("Qwen3-30B-A3B down, 8 of 128 experts, fp32", 128, 8, 8, QWEN_DOWN, "tensor", F32),
    Case("gpt-oss-20b gate_up, 2 of 32 experts, fp32", 32, 2, 4, GPT_UP, "tensor", F32),
    Case("gpt-oss-20b down, 2 of 32 experts, fp32", 32, 2, 4, GPT_DOWN, "tensor", F32),
]
GPU_CASES = [
    Case("Qwen3-30B-A3B gate_up bf16", 128, 128, 8, QWEN_UP, "tensor", BF16),
    Case("Qwen3-30B-A3B down bf16", 128, 128, 8, QWEN_DOWN, "tensor", BF16),
    Case("Qwen3-30B-A3B gate_up fp32", 128, 128, 8, QWEN_UP, "tensor", F32),
    Case("gpt-oss-20b gate_up bf16", 32, 32, 4, GPT_UP, "tensor", BF16),
    Case("gpt-oss-20b down bf16", 32, 32, 4, GPT_DOWN, "tensor", BF16),
]


def loop(
    x: Tensor, dy: Tensor, refs: list[Tensor], lengths: list[int], experts: list[int], axis: Axis
) -> list[Tensor]:
    """Loop over experts: padded inputs, all gradients of the expert, straightforward scoring."""
    out = []
    dims = {"tensor": [(1, 2)], "row": [(2,)], "column": [(1,)], "both": [(2,), (1,)]}[axis]
    xs, dys = x.split(lengths), dy.split(lengths)
    for expert in sorted(set(experts)):
        own = [s for s, e in enumerate(experts) if e == expert]
        longest = max(lengths[s] for s in own)
        batch_x, batch_dy = (
            torch.stack([pad(parts[s], (0, 0, 0, longest - lengths[s])) for s in own])
            for parts in (xs, dys)
        )
        normalized = batch_dy.transpose(1, 2) @ batch_x
        normalized = (normalized / normalized.std((1, 2), correction=0, keepdim=True)).abs()
        products = [normalized * ref[expert] for ref in refs]
        out += [p.sum(dim) for p in products for dim in dims]
    return out


def grouped_gemm(x: Tensor, dy: Tensor, lengths: list[int]) -> Callable[[], None]:
    """All gradients by the library's grouped GEMM, STORED at a time, without scoring."""
    parts = []
    begin = 0
    for first in range(0, len(lengths), STORED):
        sizes = lengths[first : first + STORED]
        rows = slice(begin, begin + sum(sizes))
        ends = torch.tensor(sizes, device=x.device).cumsum(0, dtype=torch.int32)
        parts.append((dy[rows].t(), x[rows], ends))
        begin += sum(sizes)

    def run() -> None:
        for transposed, part, ends in parts:
            torch._grouped_mm(transposed, part, offs=ends)

    def one_by_one() -> None:
        for length_dy, length_x in zip(dy.split(lengths), x.split(lengths), strict=True):
            torch.mm(length_dy.t(), length_x)

    try:
        run()
    except RuntimeError:  # CUDA has none for float32
        return one_by_one
    return run


def build(case: Case, device: str) -> Plan:
    """Alternatives of one case."""
    generator = torch.Generator(device).manual_seed(0)
    rows, cols = case.shape
    lengths, experts = case.segments()

    def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x = tensor(sum(lengths), cols, dtype=case.dtype)
    dy = tensor(sum(lengths), rows, dtype=case.dtype)
    refs = [
        torch.stack([tensor(rows, cols, dtype=BF16) for _ in range(case.kept)])
        for _ in range(case.refs)
    ]
    calls: Alternatives = {
        "gradsafe": lambda: grouped_wgrad_moments(x, dy, refs, lengths, experts, case.axis),
        "loop": lambda: loop(x, dy, refs, lengths, experts, case.axis),
    }

    def check() -> float:
        found = calls["gradsafe"]()
        return oracle.grouped_wgrad_moments(found, x, dy, refs, lengths, experts, case.axis)

    return Plan(calls, {"gemm": grouped_gemm(x, dy, lengths)}, check)

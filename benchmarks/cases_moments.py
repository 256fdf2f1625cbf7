"""Cases of `moments`: alternatives, and bytes that must be read once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import oracle
from benchmarks.plan import Alternatives, Plan
from gradsafe.ops import Axis, moments
from gradsafe.ops import _default as reference


@dataclass(frozen=True)
class Case:
    """A list of equal gradients with K references each."""

    name: str
    shape: tuple[int, int]
    tensors: int
    refs: int
    axis: Axis
    dtype: torch.dtype
    ref_dtype: torch.dtype

    @property
    def bytes_read(self) -> int:
        """Bytes of all gradients and references, each read once."""
        entries = self.tensors * self.shape[0] * self.shape[1]
        return entries * (self.dtype.itemsize + self.refs * self.ref_dtype.itemsize)


F32, BF16 = torch.float32, torch.bfloat16
MLP, ATTENTION, LORA = (2048, 5632), (2048, 2048), (8, 2048)

CPU_CASES = [
    Case("mlp both fp32", MLP, 1, 2, "both", F32, F32),
    Case("mlp both fp32, bf16 refs", MLP, 1, 2, "both", F32, BF16),
    Case("mlp both bf16", MLP, 1, 2, "both", BF16, BF16),
    Case("mlp tensor fp32", MLP, 1, 2, "tensor", F32, F32),
    Case("mlp tensor bf16", MLP, 1, 2, "tensor", BF16, BF16),
    Case("mlp row fp32", MLP, 1, 2, "row", F32, F32),
    Case("mlp column fp32", MLP, 1, 2, "column", F32, F32),
    Case("8 attention tensor fp32", ATTENTION, 8, 2, "tensor", F32, F32),
    Case("64 LoRA tensor fp32", LORA, 64, 2, "tensor", F32, F32),
]
LLAMA_MLP, LLAMA_ATTENTION = (4096, 11008), (4096, 4096)
GPU_CASES = [
    Case("7B mlp both fp32", LLAMA_MLP, 8, 2, "both", F32, F32),
    Case("7B mlp both bf16", LLAMA_MLP, 8, 2, "both", BF16, BF16),
    Case("7B mlp tensor bf16", LLAMA_MLP, 8, 2, "tensor", BF16, BF16),
    Case("7B attention tensor bf16", LLAMA_ATTENTION, 32, 2, "tensor", BF16, BF16),
    Case("7B attention row bf16", LLAMA_ATTENTION, 32, 2, "row", BF16, BF16),
    Case("64 LoRA tensor bf16", LORA, 64, 2, "tensor", BF16, BF16),
]


def shared(grads: list[Tensor], refs: list[list[Tensor]], axis: Axis) -> list[Tensor]:
    """The best eager form: abs(g) and every product computed once for all axes."""
    dims = {"tensor": [(0, 1)], "row": [(1,)], "column": [(0,)], "both": [(1,), (0,)]}[axis]
    out = []
    for g, group in zip(grads, refs, strict=True):
        magnitude, square = g.abs(), g * g
        products = [magnitude * r for r in group]
        for dim in dims:
            out += [g.sum(dim), square.sum(dim), *(p.sum(dim) for p in products)]
    return out


def foreach(grads: list[Tensor], refs: list[list[Tensor]]) -> list[Tensor]:
    """The same for axis "tensor" with PyTorch's multi-tensor kernels."""
    magnitudes = torch._foreach_abs(grads)
    out = [*torch._foreach_norm(grads, 2), *(g.sum() for g in grads)]
    for k in range(len(refs[0])):
        products = torch._foreach_mul(magnitudes, [group[k] for group in refs])
        out += [p.sum() for p in products]
    return out


def build(case: Case, device: str) -> Plan:
    """Alternatives of one case."""
    generator = torch.Generator(device).manual_seed(0)

    def matrix(dtype: torch.dtype) -> Tensor:
        return torch.randn(case.shape, generator=generator, device=device).to(dtype)

    grads = [matrix(case.dtype) for _ in range(case.tensors)]
    refs = [[matrix(case.ref_dtype) for _ in range(case.refs)] for _ in grads]
    everything = [*grads, *(r for group in refs for r in group)]
    targets = [torch.empty_like(t) for t in everything]
    compiled = torch.compile(shared, dynamic=False)
    calls: Alternatives = {
        "gradsafe": lambda: moments(grads, refs, case.axis),
        "eager": lambda: reference.moments(grads, refs, case.axis, dtype=None),
        "shared": lambda: shared(grads, refs, case.axis),
        "compile": lambda: compiled(grads, refs, case.axis),
    }
    if case.axis == "tensor" and case.dtype == case.ref_dtype:
        calls["foreach"] = lambda: foreach(grads, refs)
    roofs: Alternatives = {
        "read": lambda: [t.sum() for t in everything],
        "copy": lambda: [a.copy_(b) for a, b in zip(targets, everything, strict=True)],
    }
    return Plan(calls, roofs, lambda: oracle.moments(calls["gradsafe"](), grads, refs, case.axis))

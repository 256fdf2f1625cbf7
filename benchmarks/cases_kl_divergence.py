"""Cases of `kl_divergence_`: alternatives, and bytes that must be read or written once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import oracle
from benchmarks.plan import Alternatives, Plan
from gradsafe.ops import kl_divergence_


@dataclass(frozen=True)
class Case:
    """Logits of one chunk of tokens, of a student and a teacher in one dtype."""

    name: str
    tokens: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def bytes_touched(self) -> int:
        """Bytes of both logits, read once, and of the gradient, written once."""
        return 3 * self.tokens * self.vocabulary * self.dtype.itemsize


F32, BF16 = torch.float32, torch.bfloat16
CPU_CASES = [
    Case("1024 x 32k fp32", 1024, 32_000, F32),
    Case("1024 x 32k bf16", 1024, 32_000, BF16),
    Case("128 x 128k fp32", 128, 128_256, F32),
    Case("128 x 128k bf16", 128, 128_256, BF16),
    Case("1024 x 512 fp32", 1024, 512, F32),
]
GPU_CASES = [
    Case("1024 x 32k bf16", 1024, 32_000, BF16),
    Case("1024 x 128k fp32", 1024, 128_256, F32),
    Case("1024 x 128k bf16", 1024, 128_256, BF16),
    Case("8192 x 128k bf16", 8192, 128_256, BF16),
]


def eager(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The plain formula with autograd; the gradient is a new tensor."""
    leaf = student.detach().requires_grad_()
    value = functional.kl_div(
        leaf.float().log_softmax(1), teacher.float().softmax(1), reduction="none"
    ).sum(1)
    (gradient,) = torch.autograd.grad(value, leaf, weight)
    return value, gradient


def closed_form(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradient without autograd: what a compiler can fuse."""
    log_student = student.float().log_softmax(1)
    log_teacher = teacher.float().log_softmax(1)
    target = log_teacher.exp()
    value = (target * (log_teacher - log_student)).sum(1)
    gradient = weight[:, None] * (log_student.exp() - target)
    return value, gradient.to(student.dtype)


def build(case: Case, device: str) -> Plan:
    """Alternatives of one case."""
    generator = torch.Generator(device).manual_seed(0)

    def logits() -> Tensor:
        shape = (case.tokens, case.vocabulary)
        return torch.randn(shape, generator=generator, device=device).mul_(3).to(case.dtype)

    student, teacher, target = logits(), logits(), logits()
    weight = torch.full((case.tokens,), 1.0, device=device)
    # gradsafe overwrites the logits with the gradient, so it gets its own buffer. From the second
    # call on the buffer contains other finite numbers, which take equally long.
    buffer = student.clone()
    compiled = torch.compile(closed_form, dynamic=False)
    calls: Alternatives = {
        "gradsafe": lambda: kl_divergence_(buffer, teacher, weight),
        "eager": lambda: eager(student, teacher, weight),
        "closed_form": lambda: closed_form(student, teacher, weight),
        "compile": lambda: compiled(student, teacher, weight),
    }
    roofs: Alternatives = {
        "read": lambda: [t.sum() for t in (student, teacher)],
        "copy": lambda: target.copy_(teacher),
    }

    def check() -> float:
        gradient = student.clone()
        value = kl_divergence_(gradient, teacher, weight)
        return oracle.kl_divergence_(value, gradient, student, teacher, weight)

    return Plan(calls, roofs, check)

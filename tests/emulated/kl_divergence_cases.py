"""Cases of the entry "kl_divergence" and its results, beside the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.ops import _default as reference

from .emulator import Case, Runner, buffer_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # position = code of the kernels
ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass
class Problem:
    """Arguments of one call; without weights only the values are wanted."""

    student: Tensor
    teacher: Tensor
    weight: Tensor | None = None

    def case(self) -> Case:
        rows, vocabulary = self.student.shape
        case = Case("kl_divergence", [DTYPES.index(t.dtype) for t in (self.student, self.teacher)])
        strides = [vocabulary if rows <= 1 else t.stride(0) for t in (self.student, self.teacher)]
        case.integers += [rows, vocabulary, *strides, int(self.weight is not None)]
        tensors = (self.student, self.teacher, self.weight)
        case.buffers += [buffer_of(t) for t in tensors if t is not None]
        return case

    def parse(self, outputs: list[bytes]) -> tuple[Tensor, Tensor | None]:
        """Values and gradient; checks that nothing between the rows was written."""
        value = torch.frombuffer(bytearray(outputs[-1] + bytes(4)), dtype=torch.float32)[:-1]
        if self.weight is None:
            return value, None
        padded = bytearray(outputs[0] + bytes(4))
        flat = torch.frombuffer(padded, dtype=self.student.dtype)
        before = bytearray(buffer_of(self.student).data + bytes(4))
        kept = torch.frombuffer(before, dtype=self.student.dtype)
        rows, vocabulary = self.student.shape
        stride = vocabulary if rows <= 1 else self.student.stride(0)
        gradient = flat.as_strided((rows, vocabulary), (stride, 1)).clone()
        kept.as_strided((rows, vocabulary), (stride, 1)).copy_(gradient)
        assert torch.equal(kept.view(torch.uint8), flat.view(torch.uint8)), "wrote between rows"
        return value, gradient


def make(
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    gradient: bool = True,
) -> Problem:
    student = torch.randn(shape) * 3
    teacher = student + torch.randn(shape)
    weight = torch.rand(shape[0]) + 0.5
    weight[1::4] = 0
    return Problem(
        student.to(dtype), teacher.to(teacher_dtype or dtype), weight if gradient else None
    )


def solve(emulate: Runner, problems: Sequence[Problem]) -> list[tuple[Tensor, Tensor | None]]:
    outputs = emulate([p.case() for p in problems])
    return [p.parse(o) for p, o in zip(problems, outputs, strict=True)]


def assert_equals_oracle(emulate: Runner, problems: Sequence[Problem], ulps: float = 16.0) -> None:
    """Errors of a few float32 roundings, and as many more as a logit is below the largest one."""
    for problem, (value, gradient) in zip(problems, solve(emulate, problems), strict=True):
        student, teacher = problem.student.double(), problem.teacher.double()
        spread = (teacher - student).abs().nan_to_num(0, posinf=0).amax(1) + 1
        wanted = reference.kl_divergence(student, teacher)
        assert torch.all((value - wanted).abs() <= ulps * 2.0**-24 * spread)
        if gradient is None or problem.weight is None:
            continue
        exact = student.clone()
        reference.kl_divergence_(exact, teacher, problem.weight)
        bound = (
            2.0**-24
            * problem.weight.double()[:, None]
            * sum(
                x.softmax(1) * ((x.amax(1, keepdim=True) - x).clamp(max=200) + ulps)
                for x in (student, teacher)
            )
        )
        bound += ULP[gradient.dtype] * exact.abs() + 2.0**-25 * (gradient.dtype == torch.float16)
        assert torch.all((gradient.double() - exact).abs() <= bound + 1e-37)

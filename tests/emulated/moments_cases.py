"""Cases of the entry "moments" and its results as `Moments`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.ops import AXES, Moments
from gradsafe.ops import _default as reference

from .emulator import Case, Runner, buffer_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REF_DTYPES = (*DTYPES, torch.float8_e4m3fn)  # position = code of the kernels
FIELDS = ("sum", "sum_sq", "dots")


@dataclass
class Problem:
    """Arguments of one call of `gradsafe.ops.moments`."""

    grads: list[Tensor]
    refs: list[list[Tensor]]
    axis: str = "tensor"
    unsigned: bool = True

    def case(self) -> Case:
        num_refs = len(self.refs[0]) if self.refs else 0
        grad_dtype = self.grads[0].dtype if self.grads else torch.float32
        ref_dtype = self.refs[0][0].dtype if num_refs else grad_dtype
        case = Case("moments", [DTYPES.index(grad_dtype), REF_DTYPES.index(ref_dtype)])
        case.integers += [AXES.index(self.axis), num_refs, int(self.unsigned), len(self.grads)]
        for grad, group in zip(self.grads, self.refs, strict=True):
            case.integers += grad.shape
            for matrix in (grad, *group):
                rows, cols = matrix.shape
                case.integers.append(cols if rows <= 1 else matrix.stride(0))
                case.buffers.append(buffer_of(matrix))
        return case

    def expected(self) -> tuple[Moments, ...]:
        return pair(reference.moments(self.grads, self.refs, self.axis, self.unsigned))

    def scales(self) -> tuple[Moments, ...]:
        """Sums of absolute terms: the natural scale of the rounding error of each result."""
        refs = [[r.float().abs() for r in group] for group in self.refs]
        return pair(reference.moments([g.abs() for g in self.grads], refs, self.axis))

    def parse(self, output: bytes) -> tuple[Moments, ...]:
        """Results lie task after task: [quantities, rows], then [quantities, columns]."""
        flat = torch.frombuffer(bytearray(output + bytes(8)), dtype=torch.float64)[:-1]
        results = tuple(Moments([], [], [], []) for _ in range(2 if self.axis == "both" else 1))
        position = 0
        for grad, group in zip(self.grads, self.refs, strict=True):
            rows, cols = grad.shape
            shapes = {"tensor": [()], "row": [(rows,)], "column": [(cols,)]}.get(
                self.axis, [(rows,), (cols,)]
            )
            for result, shape in zip(results, shapes, strict=True):
                slices = shape[0] if shape else 1
                size = (3 + len(group)) * slices
                values = flat[position : position + size].view(3 + len(group), *shape)
                position += size
                result.count.append(values[0])
                result.sum.append(values[1])
                result.sum_sq.append(values[2])
                result.dots.append(values[3:])
        assert position == flat.numel()
        return results


def pair(result: Moments | tuple[Moments, Moments]) -> tuple[Moments, ...]:
    return result if isinstance(result, tuple) else (result,)


def make(
    shapes: Sequence[tuple[int, int]],
    k: int = 2,
    axis: str = "tensor",
    unsigned: bool = True,
    dtype: torch.dtype = torch.float32,
    ref_dtype: torch.dtype | None = None,
) -> Problem:
    grads = [torch.randn(shape).to(dtype) for shape in shapes]
    refs = [[torch.randn(shape).to(ref_dtype or dtype) for _ in range(k)] for shape in shapes]
    return Problem(grads, refs, axis, unsigned)


def solve(emulate: Runner, problems: Sequence[Problem]) -> list[tuple[Moments, ...]]:
    outputs = emulate([p.case() for p in problems])
    return [p.parse(o[0]) for p, o in zip(problems, outputs, strict=True)]


def assert_equals_oracle(emulate: Runner, problems: Sequence[Problem], ulps: float = 8.0) -> None:
    """Error within a few float32 roundings of the sum of absolute terms, for every slice."""
    for problem, results in zip(problems, solve(emulate, problems), strict=True):
        for got, want, scale in zip(results, problem.expected(), problem.scales(), strict=True):
            for a, b in zip(got.count, want.count, strict=True):
                assert torch.equal(a, b)
            for name in FIELDS:
                for a, b, s in zip(
                    getattr(got, name), getattr(want, name), getattr(scale, name), strict=True
                ):
                    assert a.shape == b.shape
                    error = (a - b).abs()
                    assert torch.all(error <= ulps * 2.0**-24 * s + 1e-300), (name, problem.axis)

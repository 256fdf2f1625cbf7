"""Cases of the entry "wgrad_moments", their float64 oracle and the bound of their error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.ops import AXES

from .emulator import Case, Runner, buffer_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REF_DTYPES = (*DTYPES, torch.float8_e4m3fn)  # position = code of the kernels
UNIT = 2.0**-24  # the relative error of one float32 rounding
CHAIN = 48  # float32 additions that one entry goes through, at most; float64 after that


@dataclass
class Problem:
    """x and dy are packed: sample b owns `lengths[b]` rows from row `starts[b]` on.

    With experts, sample b is scored against matrix `experts[b]` of each reference.
    """

    x: Tensor  # [rows, I]
    dy: Tensor  # [rows, O]
    starts: list[int]
    lengths: list[int]
    refs: list[Tensor]  # [O, I] each; with experts [E, O, I]
    axis: str = "tensor"
    unsigned: bool = True
    experts: list[int] | None = None

    def case(self) -> Case:
        ref_dtype = self.refs[0].dtype if self.refs else self.x.dtype
        case = Case("wgrad_moments", [DTYPES.index(self.x.dtype), REF_DTYPES.index(ref_dtype)])
        case.integers += [AXES.index(self.axis), len(self.refs), int(self.unsigned)]
        case.integers += [len(self.starts), self.dy.shape[1], self.x.shape[1]]
        for matrix in (self.x, self.dy, *self.refs):
            case.integers.append(matrix.stride(-2))
            case.buffers.append(buffer_of(matrix))
        case.integers += [*self.starts, *self.lengths, self.experts is not None]
        if self.experts is not None:
            case.integers += [*(ref.stride(0) for ref in self.refs), *self.experts]
        return case

    def expected(self, b: int) -> tuple[list[Tensor], list[Tensor]]:
        """Quantities of sample b in float64, [Q, slices] per direction, and bounds of their error.

        The kernel sums the T products of an entry in float32: at most T roundings (half an ulp in
        fused multiply-adds; a tensor core truncates, but rounds less often), so the entry g is off
        by d = (T + 1) u a with a = sum_t |dy_t x_t| and u = 2^-24. A sum of terms f(g) is then off
        by sum |f'(g)| d, and by the roundings on its way: CHAIN u sum |f(g)|. The term d^2 of the
        squares, and a factor that covers second order effects, are included.
        """
        rows = slice(self.starts[b], self.starts[b] + self.lengths[b])
        x, dy = self.x[rows].double(), self.dy[rows].double()
        g = dy.T @ x
        off = (self.lengths[b] + 1) * UNIT * (dy.abs().T @ x.abs())
        terms = [torch.ones_like(g), g, g * g]
        errors = [torch.zeros_like(g), off, 2 * g.abs() * off + off**2]
        for ref in self.refs:
            r = (ref if self.experts is None else ref[self.experts[b]]).double()
            terms.append((g.abs() if self.unsigned else g) * r)
            errors.append(off * r.abs())
        reduced = {"tensor": [(0, 1)], "row": [1], "column": [0], "both": [1, 0]}[self.axis]
        values, bounds = [], []
        for over in reduced:
            values.append(torch.stack([t.sum(over).reshape(-1) for t in terms]))
            bound = [
                1.01 * (e + (CHAIN * UNIT * t.abs() if i else 0)).sum(over).reshape(-1) + 1e-37
                for i, (t, e) in enumerate(zip(terms, errors, strict=True))
            ]
            bounds.append(torch.stack(bound))
        return values, bounds

    def parse(self, output: bytes) -> list[list[Tensor]]:
        """[sample][direction] of [Q, slices]."""
        flat = torch.frombuffer(bytearray(output + bytes(8)), dtype=torch.float64)[:-1]
        outs, ins, q = self.dy.shape[1], self.x.shape[1], 3 + len(self.refs)
        sizes = {"tensor": [1], "row": [outs], "column": [ins], "both": [outs, ins]}[self.axis]
        results, position = [], 0
        for _ in self.starts:
            directions = []
            for size in sizes:
                directions.append(flat[position : position + q * size].view(q, size))
                position += q * size
            results.append(directions)
        assert position == flat.numel()
        return results


def make(
    shape: tuple[int, int],
    lengths: Sequence[int],
    k: int = 2,
    axis: str = "tensor",
    unsigned: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    ref_dtype: torch.dtype | None = None,
    experts: Sequence[int] | None = None,
) -> Problem:
    """Packed samples for weights `shape` = [O, I], or [E, O, I] with one expert more than used."""
    outs, ins = shape
    rows = sum(lengths)
    starts = [sum(lengths[:b]) for b in range(len(lengths))]
    x, dy = torch.randn(rows, ins).to(dtype), torch.randn(rows, outs).to(dtype)
    stack = shape if experts is None else (max(experts, default=0) + 2, *shape)
    refs = [torch.randn(stack).to(ref_dtype or dtype) for _ in range(k)]
    own = None if experts is None else list(experts)
    return Problem(x, dy, starts, list(lengths), refs, axis, unsigned, own)


def solve(emulate: Runner, problems: Sequence[Problem]) -> list[list[list[Tensor]]]:
    outputs = emulate([p.case() for p in problems])
    return [p.parse(o[0]) for p, o in zip(problems, outputs, strict=True)]


def same(got: Tensor, want: Tensor, bound: Tensor) -> Tensor:
    """Whether each value is within its bound, or exactly as infinite or undefined as it should."""
    near = (got - want).abs() <= bound
    return near | (got == want) | (got.isnan() & want.isnan())


def assert_equals_oracle(emulate: Runner, problems: Sequence[Problem]) -> None:
    for problem, samples in zip(problems, solve(emulate, problems), strict=True):
        for b, directions in enumerate(samples):
            wanted, bounds = problem.expected(b)
            for got, want, bound in zip(directions, wanted, bounds, strict=True):
                assert got.shape == want.shape
                bad = ~same(got, want, bound)
                assert not bad.any(), (problem.axis, b, bad.nonzero().tolist()[:5])

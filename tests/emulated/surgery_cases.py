"""Cases of the entries "surgery*" and "surgery_adamw", and their float64 oracle."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradsafe.ops import _default as reference

from .emulator import Buffer, Case, Runner, buffer_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # position = code of the kernels
TILE = 32768  # kSurgeryTile of csrc/include/gradsafe/surgery.h
UNIT = 2.0**-24  # the relative error of one float32 rounding


def bits(*values: float) -> list[int]:
    return [struct.unpack("<q", struct.pack("<d", value))[0] for value in values]


def tensor_of(output: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(output + bytes(8)), dtype=dtype)[
        : len(output) // dtype.itemsize
    ]


@dataclass
class Problem:
    """Arguments of one call of `gradsafe.ops.surgery_`; flat tensors."""

    user: list[Tensor]
    align: list[Tensor]
    rho: float = 1.0
    groups: list[int] | None = None

    @property
    def num_groups(self) -> int:
        return 1 if self.groups is None else max(self.groups, default=-1) + 1

    def facts(self, index: int) -> list[int]:
        group = 0 if self.groups is None else self.groups[index]
        u = self.user[index]
        return [u.numel(), DTYPES.index(u.dtype), group]

    def case(self, entry: str = "surgery", sums: Tensor | None = None) -> Case:
        case = Case(entry, [len(self.user), self.num_groups])
        case.integers += [] if entry == "surgery_sums" else bits(self.rho)
        case.buffers += [] if sums is None else [buffer_of(sums)]
        for index, pair in enumerate(zip(self.user, self.align, strict=True)):
            case.integers += self.facts(index)
            case.buffers += map(buffer_of, pair)
        return case

    def parse(self, outputs: list[bytes]) -> tuple[list[Tensor], Tensor]:
        """The users after the merge, and the results [G, 4]."""
        users = [tensor_of(o, u.dtype) for o, u in zip(outputs, self.user, strict=False)]
        return users, tensor_of(outputs[-1], torch.float64).view(self.num_groups, 4)


def make(
    sizes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    rho: float = 1.0,
    groups: list[int] | None = None,
    conflict: bool = True,
) -> Problem:
    user = [torch.randn(n) for n in sizes]
    sign = 1 if conflict else -1
    align = [sign * (torch.randn_like(u) - 2 * u) for u in user]
    return Problem([u.to(dtype) for u in user], [a.to(dtype) for a in align], rho, groups)


def solve(emulate: Runner, problems: Sequence[Problem]) -> list[tuple[list[Tensor], Tensor]]:
    outputs = emulate([p.case() for p in problems])
    return [p.parse(o) for p, o in zip(problems, outputs, strict=True)]


def assert_sums(problem: Problem, sums: Tensor, ulps: float = 8.0) -> None:
    """Sums [G, 3] within a few float32 roundings of the sums of absolute terms."""
    groups = problem.groups if problem.groups is not None else [0] * len(problem.user)
    want = reference.surgery_sums(problem.user, problem.align, groups)
    absolute = ([t.abs() for t in tensors] for tensors in (problem.user, problem.align))
    scale = reference.surgery_sums(*absolute, groups)
    finite = want.isfinite()
    assert torch.equal(sums.isfinite(), finite.view_as(sums))
    error = (sums - want.view_as(sums)).abs()
    assert torch.all((error <= ulps * UNIT * scale + 1e-300) | ~finite)


def assert_equals_oracle(emulate: Runner, problems: Sequence[Problem]) -> None:
    for problem, (users, results) in zip(problems, solve(emulate, problems), strict=True):
        if problem.user:
            assert_sums(problem, results[:, :3])
        again = reference.surgery_merge_([], [], results[:, :3], problem.rho, [])
        assert torch.allclose(results, again, rtol=1e-15, atol=0, equal_nan=True)
        for index, (u, got) in enumerate(zip(problem.user, users, strict=True)):
            coefficient = float(results[problem.facts(index)[2], 3])
            if math.isnan(coefficient):
                assert torch.equal(got, u)
                continue
            added = coefficient * problem.align[index].double()
            exact = u.double() + added
            # Rounded: the coefficient, and the result to the tensor's dtype.
            bound = 0.75 * torch.finfo(u.dtype).eps * exact.abs() + 1.5 * UNIT * added.abs()
            assert torch.all((got.double() - exact).abs() <= bound + torch.finfo(u.dtype).tiny)


@dataclass
class AdamwProblem:
    """Arguments of one call of `gradsafe.ops.surgery_adamw_` with given sums."""

    pairs: Problem
    params: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    steps: list[Tensor]
    sums: Tensor
    options: dict = field(
        default_factory=lambda: {
            "lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1
        }
    )  # fmt: skip

    def case(self) -> Case:
        o = self.options
        case = Case("surgery_adamw", [len(self.params), len(self.steps), self.pairs.num_groups])
        scalars = (self.pairs.rho, o["lr"], *o["betas"], o["eps"], o["weight_decay"])
        case.integers += bits(*scalars)
        case.buffers.append(buffer_of(self.sums))
        case.buffers += [Buffer(buffer_of(s.reshape(1)).data) for s in self.steps]
        lists = (self.pairs.user, self.pairs.align, self.params, self.exp_avg, self.exp_avg_sq)
        for index, tensors in enumerate(zip(*lists, strict=True)):
            case.integers += [*self.pairs.facts(index), index % len(self.steps)]
            case.buffers += map(buffer_of, tensors)
        return case

    def parse(self, outputs: list[bytes]) -> tuple[list[Tensor], Tensor]:
        """Counters, then param, exp_avg and exp_avg_sq of each task; and the results [G, 4]."""
        count = len(self.steps)
        states = [tensor_of(o, torch.float32) for o in outputs[:count]]
        for index, u in enumerate(self.pairs.user):
            first = count + 3 * index
            states += [tensor_of(o, u.dtype) for o in outputs[first : first + 3]]
        return states, tensor_of(outputs[-1], torch.float64).view(-1, 4)

    def expected(self) -> tuple[list[Tensor], Tensor]:
        """The same by the plain definition in float64, without rounding to the tensor's dtype."""
        params, first, second = (
            [t.double() for t in tensors]
            for tensors in (self.params, self.exp_avg, self.exp_avg_sq)
        )
        steps = [s.clone() for s in self.steps]
        each = [steps[i % len(steps)] for i in range(len(params))] if len(steps) > 1 else steps
        results = reference.surgery_adamw_(
            params, self.pairs.user, self.pairs.align, first, second, each,
            rho=self.pairs.rho, groups=self.pairs.groups or [0] * len(params), sums=self.sums,
            **self.options,
        )  # fmt: skip
        states = [t for task in zip(params, first, second, strict=True) for t in task]
        return [*(s.reshape(1) for s in steps), *states], results


def make_adamw(
    sizes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    groups: list[int] | None = None,
    one_counter: bool = False,
) -> AdamwProblem:
    pairs = make(sizes, dtype, 0.5, groups)
    sums = torch.randn(pairs.num_groups, 3, dtype=torch.float64)
    sums[:, 1:].abs_().add_(0.5)  # both signs of the dot product
    return AdamwProblem(
        pairs,
        [torch.randn(n).to(dtype) for n in sizes],
        [(torch.randn(n) * 0.3).to(dtype) for n in sizes],
        [(torch.rand(n) + 0.1).to(dtype) for n in sizes],
        [torch.tensor(3.0 + i) for i in range(1 if one_counter else len(sizes))],
        sums,
    )


def assert_adamw_equals_oracle(emulate: Runner, problems: Sequence[AdamwProblem]) -> None:
    outputs = emulate([p.case() for p in problems])
    for problem, output in zip(problems, outputs, strict=True):
        states, results = problem.parse(output)
        expected, want = problem.expected()
        assert torch.allclose(results, want, rtol=1e-15, atol=0, equal_nan=True)
        for got, exact in zip(states, expected, strict=True):
            bound = 0.75 * torch.finfo(got.dtype).eps * exact.abs() + 2e-6
            assert torch.all((got.double() - exact.double()).abs() <= bound)

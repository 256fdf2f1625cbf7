"""csrc/cuda/subspace_surgery.cu on the emulated grid, against the float64 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gradsafe.ops import _default as reference
from gradsafe.ops import subspace_surgery_

from .emulator import Case, Runner, buffer_of
from .planted import ORACLE, Bug, Target
from .surgery_cases import DTYPES, TILE, UNIT, bits, tensor_of


@dataclass
class Problem:
    """Arguments of one call; flat tensors."""

    user: list[Tensor]
    basis: list[Tensor]
    direction: Tensor
    rho: float = 0.5

    def case(self) -> Case:
        case = Case("subspace_surgery", [len(self.user), len(self.direction), *bits(self.rho)])
        case.buffers.append(buffer_of(self.direction))
        for u, vectors in zip(self.user, self.basis, strict=True):
            case.integers += [u.numel(), DTYPES.index(u.dtype)]
            case.buffers += [buffer_of(u), buffer_of(vectors)]
        return case


def make(sizes, dtype=torch.float32, rank=3, conflict=True, rho=0.5) -> Problem:
    u = torch.randn(sum(sizes), dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(sum(sizes), rank, dtype=torch.float64))[0].T
    direction = (vectors @ u) * (-1 if conflict else 1)
    return Problem(
        [part.to(dtype) for part in u.split(sizes)],
        [part.contiguous().to(dtype) for part in vectors.split(sizes, 1)],
        direction,
        rho,
    )


def assert_equals_oracle(emulate, problems) -> None:
    outputs = emulate([p.case() for p in problems])
    for problem, output in zip(problems, outputs, strict=True):
        rank = len(problem.direction)
        results = tensor_of(output[-1], torch.float64)
        expected = [u.double() for u in problem.user]
        want = reference.subspace_surgery_(expected, problem.basis, problem.direction, problem.rho)
        if not want[0].isfinite():
            assert math.isnan(results[0])
            for u, got in zip(problem.user, output, strict=False):
                assert torch.equal(tensor_of(got, u.dtype).nan_to_num(7.0), u.nan_to_num(7.0))
            continue
        size = sum(float(u.double().norm()) for u in problem.user)
        assert torch.allclose(results[1 : 2 + rank], want[1 : 2 + rank], rtol=1e-6,
                              atol=8 * UNIT * size)  # fmt: skip
        assert torch.allclose(results[0], problem.direction @ results[2 : 2 + rank], rtol=1e-12)
        opposed = results[2 : 2 + rank] if results[0] < 0 else 0
        wanted = problem.rho * problem.direction - opposed
        assert torch.allclose(results[2 + rank :], wanted, rtol=1e-12, atol=0)
        for u, vectors, data in zip(problem.user, problem.basis, output, strict=False):
            got = tensor_of(data, u.dtype).double()
            added = results[2 + rank :, None] * vectors.double()
            exact, terms = u.double() + added.sum(0), u.double().abs() + added.abs().sum(0)
            bound = 0.51 * torch.finfo(u.dtype).eps * exact.abs() + (rank + 2) * UNIT * terms
            assert torch.all((got - exact).abs() <= bound + torch.finfo(u.dtype).tiny)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4, 7, 16])
def test_tiles_whole_and_ragged(emulate, dtype, rank):
    sizes = [TILE, 0, 5, TILE + 24, 1031]
    assert_equals_oracle(emulate, [make(sizes, dtype, rank)])


def test_with_and_without_a_conflict_and_rho(emulate):
    problems = [
        make([517, 40], rank=5, conflict=c, rho=r) for c in (True, False) for r in (0.0, 2.0)
    ]
    assert_equals_oracle(emulate, problems)


def test_more_tensors_than_a_launch_takes(emulate):
    assert_equals_oracle(emulate, [make([3] * 803, rank=2)])


def test_values_that_are_not_finite(emulate):
    problems = []
    for value in (math.nan, math.inf):
        for where in ("user", "basis", "direction"):
            problem = make([700], rank=2)
            tensors = {"user": problem.user[0], "basis": problem.basis[0]}
            tensors.get(where, problem.direction).view(-1)[1] = value
            problems.append(problem)
    assert_equals_oracle(emulate, problems)


def test_the_cpu_agrees_bit_by_bit_on_the_elements(emulate):
    """With the same coefficients the merge rounds the same way."""
    problem = make([3000], rank=4, conflict=False, rho=1.0)
    output = emulate([problem.case()])[0]
    own = [u.clone() for u in problem.user]
    subspace_surgery_(own, problem.basis, problem.direction, 1.0)
    assert torch.equal(tensor_of(output[0], torch.float32), own[0])


FILE = "cuda/subspace_surgery.cu"
# No bug, and part of every copy: short lists already take several launches.
SMALL = [(FILE, "constexpr int kMaxEntries = 800;", "constexpr int kMaxEntries = 2;")]
BUGS = {
    "no barrier before the coefficients are read": Bug(
        FILE,
        "  __syncthreads();\n  if (batch.tiles == 0",
        "  if (batch.tiles == 0",
        r"(race|uninitialised): reads .*`coefficients`",
    ),
    "the sum of squares at the place of a vector that does not exist": Bug(
        FILE,
        "out[q] = totals[q == batch.rank ? kRank : q];",
        "out[q] = totals[q];",
        ORACLE,
    ),
    "vectors that lie a tile apart": Bug(
        FILE,
        "load_words<T, kWhole>(basis + j * task.count, base, s.end, v);",
        "load_words<T, kWhole>(basis + j * kSurgeryTile, base, s.end, v);",
        rf"({ORACLE}|out of bounds|misaligned)",
    ),
    "a launch that forgets where its partial sums start": Bug(
        FILE,
        "(batch.first_tile + blockIdx.x) * (batch.rank + 1)",
        "blockIdx.x * (batch.rank + 1)",
        rf"({ORACLE}|uninitialised: reads .*the workspace)",
    ),
    "only the first vector's alignment is looked at": Bug(
        FILE,
        "if (rank > 1) places |= step;",
        "",
        r"misaligned",
    ),
    "a projection without a conflict": Bug(
        "common/surgery_math.h",
        "return rho * direction[j] - (conflict < 0 ? sums[j] : 0);",
        "return rho * direction[j] - sums[j];",
        ORACLE,
    ),
}


def check(emulate: Runner) -> None:
    problems = [make([TILE, 700, 40], rank=3), make([517, TILE + 1, 3], rank=5)]
    problems += [make([517], rank=2, conflict=False), make([TILE + 1], rank=3)]
    assert_equals_oracle(emulate, problems)


TARGET = Target(["subspace_surgery"], SMALL, check)


@pytest.mark.usefixtures("needs_a_compiler")
def test_without_a_bug_nothing_is_found(tmp_path):
    TARGET.passes(tmp_path)


@pytest.mark.usefixtures("needs_a_compiler")
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, tmp_path):
    TARGET.finds(tmp_path, BUGS[bug])

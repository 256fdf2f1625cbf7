"""Bugs planted into copies of the surgery kernels are found; each names the check."""

from __future__ import annotations

import math

import pytest
import torch

from .emulator import Runner
from .planted import ORACLE, Bug, Target
from .surgery_cases import (
    TILE,
    Problem,
    assert_adamw_equals_oracle,
    assert_equals_oracle,
    make,
    make_adamw,
)

pytestmark = pytest.mark.usefixtures("needs_a_compiler")

SURGERY, ADAMW = "cuda/surgery.cu", "cuda/surgery_adamw.cu"
MATH, VEC = "common/surgery_math.h", "cuda/common/vec.cuh"

# No bug, and part of every copy: short lists already take several launches of every kind.
SMALL = [
    (SURGERY, "constexpr int kMaxEntries = 800;", "constexpr int kMaxEntries = 3;"),
    (SURGERY, "constexpr int kMaxGroups = 2048;", "constexpr int kMaxGroups = 2;"),
    (ADAMW, "constexpr int kMaxEntries = 400;", "constexpr int kMaxEntries = 3;"),
    (ADAMW, "constexpr int kMaxSteps = 4000;", "constexpr int kMaxSteps = 2;"),
]

BUGS = {
    "a launch that forgets where its partial sums start": Bug(
        SURGERY,
        "(batch.first_tile + blockIdx.x) * kSurgerySums",
        "blockIdx.x * kSurgerySums",
        rf"({ORACLE}|uninitialised: reads .*the workspace)",
    ),
    "a group that reads its neighbour's partial sums": Bug(
        SURGERY,
        "const int64_t end = groups.first_tile[blockIdx.x + 1];",
        "const int64_t end = groups.first_tile[blockIdx.x + 1] + 1;",
        rf"({ORACLE}|out of bounds: reads .*the workspace)",
    ),
    "tasks in the order of the list, groups mixed": Bug(
        SURGERY,
        "return call.tasks[a].group < call.tasks[b].group;",
        "return a < b;",
        ORACLE,
    ),
    "a launch of groups that starts from the first": Bug(
        SURGERY,
        "groups.sums = sums + begin * kSurgerySums;",
        "groups.sums = sums;",
        rf"({ORACLE}|uninitialised|race)",
    ),
    "a tile that is one element too long": Bug(
        SURGERY,
        "s.end = min(s.begin + kSurgeryTile, e.task.count);",
        "s.end = min(s.begin + kSurgeryTile + 1, e.task.count);",
        r"race: \w+ (.|\n)*another block",
    ),
    "an end that is one too far": Bug(
        SURGERY,
        "s.end = min(s.begin + kSurgeryTile, e.task.count);",
        "s.end = min(s.begin + kSurgeryTile, e.task.count + 1);",
        r"out of bounds: reads",
    ),
    "only the user gradient's alignment is looked at": Bug(
        SURGERY,
        "reinterpret_cast<uintptr_t>(e.task.user) | reinterpret_cast<uintptr_t>(e.task.align);",
        "reinterpret_cast<uintptr_t>(e.task.user);",
        r"misaligned: reads 16 bytes",
    ),
    "a merge that takes a tile twice": Bug(
        SURGERY,
        "const int64_t tile = batch.tiles - 1 - blockIdx.x;",
        "const int64_t tile = batch.tiles - 1 - blockIdx.x / 2;",
        rf"({ORACLE}|race)",
    ),
    "every launch writes the results": Bug(
        SURGERY,
        "batch.first_launch = false;",
        "batch.out += 4 * batch.groups;",
        r"out of bounds: writes",
    ),
    "a NaN that passes the gate": Bug(
        SURGERY,
        "if (coefficient == 0 || coefficient != coefficient) return;",
        "if (coefficient == 0) return;",
        ORACLE,
    ),
    "a projection without a conflict": Bug(
        MATH, "dot < 0 && sq_align > 0 ?", "sq_align > 0 ?", ORACLE
    ),
    "a 16-bit rounding that truncates": Bug(
        VEC, "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16", "bits >> 16", ORACLE
    ),
    "a counter advanced before everyone knows the verdict": Bug(
        ADAMW,
        "  block_sum_to(mine, shared, &invalid);\n  __syncthreads();\n",
        "  block_sum_to(mine, shared, &invalid);\n",
        r"(race|uninitialised): \w+ .*`invalid`",
    ),
    "no barrier behind the scalars": Bug(
        ADAMW,
        "*e.task.step);\n  __syncthreads();\n",
        "*e.task.step);\n",
        r"(race|uninitialised): \w+ .*`shared`",
    ),
    "a step that only its own group can stop": Bug(
        ADAMW, "const bool valid = invalid == 0;", "const bool valid = true;", ORACLE
    ),
    "counters advanced once per launch": Bug(
        ADAMW,
        "std::copy_n(call.steps + begin, a.count, a.steps);",
        "std::copy_n(call.steps, a.count, a.steps);",
        ORACLE,
    ),
    "a state whose alignment is forgotten": Bug(
        ADAMW,
        "                           reinterpret_cast<uintptr_t>(task.exp_avg) |\n",
        "",
        r"misaligned: \w+ 16 bytes",
    ),
}


def check(run: Runner) -> None:
    problems = [
        make([300, TILE + 5, 7, 2 * TILE, 40], groups=[2, 0, 1, 0, 1]),
        make([TILE + 9, 5], torch.bfloat16),
        make([500, 3], conflict=False),
        make([40]),
    ]
    problems[-1].align[0][3] = math.inf
    memory = torch.randn(TILE + 1), torch.randn(TILE + 1)
    problems.append(Problem([memory[0][:-1]], [memory[1][1:]]))
    steps = make_adamw([300, TILE, 7, 50], groups=[0, 1, 0, 1])
    stopped = make_adamw([30, 40], groups=[0, 1])
    stopped.sums[1, 0] = math.nan
    shifted = make_adamw([TILE])
    shifted.exp_avg[0] = torch.cat([torch.zeros(1), shifted.exp_avg[0]])[1:]
    assert_equals_oracle(run, problems)
    assert_adamw_equals_oracle(run, [steps, stopped, shifted])


TARGET = Target(["surgery", "surgery_adamw"], SMALL, check)


def test_the_unmodified_kernel_passes(tmp_path):
    TARGET.passes(tmp_path)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(tmp_path, name):
    TARGET.finds(tmp_path, BUGS[name])

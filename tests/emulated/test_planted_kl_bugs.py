"""Bugs planted into copies of the KL kernel are found; the check that finds each is named."""

from __future__ import annotations

import pytest
import torch

from .emulator import Runner
from .kl_divergence_cases import Problem, assert_equals_oracle, make
from .planted import ORACLE, Bug, Target

pytestmark = pytest.mark.usefixtures("needs_a_compiler")

KL = "cuda/kl_divergence.cu"

# Fewer instantiations: only float32 is compiled. No bug, and part of every copy.
FLOAT_ONLY = [
    (
        KL,
        "    case DType::bf16: return &kl_rows<S, bf16>;\n    default: return &kl_rows<S, f16>;\n",
        "    default: return nullptr;\n",
    ),
    (
        KL,
        "    case DType::bf16: return choose_teacher<bf16>(p.teacher_dtype);\n"
        "    default: return choose_teacher<f16>(p.teacher_dtype);\n",
        "    default: return nullptr;\n",
    ),
]

BUGS = {
    "no barrier between the warps' maxima and the block's": Bug(
        KL,
        "    shared[kWarps + warp] = teacher;\n  }\n  __syncthreads();\n",
        "    shared[kWarps + warp] = teacher;\n  }\n",
        r"(race|uninitialised): reads .*`maxima_shared`",
    ),
    "no barrier before the totals are read": Bug(
        KL,
        "    block_sum_to(sums, sums_shared, totals);\n    __syncthreads();\n",
        "    block_sum_to(sums, sums_shared, totals);\n",
        r"(race|uninitialised): reads .*`totals`",
    ),
    "sums that stay behind when the maxima move": Bug(
        KL, "    own.move_to(maxima);\n", "    own.maxima = maxima;\n", ORACLE
    ),
    "only the first thread's maxima": Bug(
        KL, "for (int w = 0; w < kWarps; ++w) {", "for (int w = 0; w < 0; ++w) {", ORACLE
    ),
    "columns behind the end that count": Bug(
        KL, ": -INFINITY;", ": 0.0f;", ORACLE
    ),
    "a bound that is one too large": Bug(
        KL, "col + i < end ? widen", "col + i <= end ? widen", r"out of bounds: reads|race: writes"
    ),
    "a vector store to an unaligned row": Bug(
        KL,
        "  if (aligned && end - col >= N) {\n    store_pack",
        "  if (end - col >= N) {\n    store_pack",
        r"misaligned: writes 16 bytes",
    ),
    "two blocks on one row": Bug(
        KL,
        "row < p.rows; row += gridDim.x) {",
        "row < p.rows; row += 1) {",
        r"race: \w+ (.|\n)*another block",
    ),
    "an infinity that meets a factor of 0": Bug(
        "common/kl_value.h",
        "return factor == 0 ? Float{0} : cross * factor;",
        "return cross * factor;",
        ORACLE,
    ),
}  # fmt: skip


def check(run: Runner) -> None:
    problems = [make((3, 2100)), make((4, 5001))]
    view = torch.randn(6, 90)[:, 3:80]
    problems.append(Problem(view, torch.randn(6, 77), torch.ones(6)))
    vanishing = make((1, 5000))
    vanishing.student[0, 4990] = vanishing.teacher[0, 4990] = 900  # underflows in float64 too
    vanishing.student[0, 0] = -float("inf")
    vanishing.teacher[0, 0] = -30
    problems.append(vanishing)
    assert_equals_oracle(run, problems)


TARGET = Target(["kl_divergence"], FLOAT_ONLY, check)


def test_the_unmodified_kernel_passes(tmp_path):
    TARGET.passes(tmp_path)


def test_more_rows_than_blocks(tmp_path):
    """Two blocks share all rows: no bug, only a smaller grid than the kernel's own limit."""
    small = (KL, "constexpr int64_t kMaxBlocks = 16384;", "constexpr int64_t kMaxBlocks = 2;")
    TARGET.passes(tmp_path, [small])


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(tmp_path, name):
    TARGET.finds(tmp_path, BUGS[name])

"""Bugs planted into copies of the real kernels are found; the check that finds each is named."""

from __future__ import annotations

import pytest
import torch

from .emulator import Runner
from .moments_cases import Problem, assert_equals_oracle, make
from .planted import ORACLE, Bug, Target

pytestmark = pytest.mark.usefixtures("needs_a_compiler")

MOMENTS, REDUCE = "cuda/moments.cu", "cuda/common/reduce.cuh"

# Fewer instantiations: only float32 is compiled. No bug, and part of every copy.
FLOAT_ONLY = [
    (
        MOMENTS,
        "    case DType::bf16: return choose_refs<G, bf16>(problem.num_refs);\n"
        "    case DType::f16: return choose_refs<G, f16>(problem.num_refs);\n"
        "    default: return choose_refs<G, f8>(problem.num_refs);\n",
        "    default: return nullptr;\n",
    ),
    (
        MOMENTS,
        "    case DType::bf16: return choose_ref_dtype<bf16>(problem);\n"
        "    default: return choose_ref_dtype<f16>(problem);\n",
        "    default: return nullptr;\n",
    ),
]


BUGS = {
    "no barrier between the warps' sums and their total": Bug(
        REDUCE,
        "    if (lane == 0) shared[warp * Q + q] = total;\n  }\n  __syncthreads();\n",
        "    if (lane == 0) shared[warp * Q + q] = total;\n  }\n",
        r"(race|uninitialised): reads .*`shared`",
    ),
    "no barrier before shared memory is used again": Bug(
        MOMENTS,
        "    __syncthreads();  // the next quantity reuses `shared`\n",
        "",
        r"race: \w+ .*`shared`",
    ),
    "a bound that is one too large": Bug(
        MOMENTS,
        "r.col_end = min(r.col_begin + e.tile_cols, e.cols);",
        "r.col_end = min(r.col_begin + e.tile_cols, e.cols + 1);",
        r"out of bounds: reads",
    ),
    "the wrong half in the shuffles of a reduction": Bug(
        REDUCE,
        "const float send = upper ? v[i] : v[i + kHalf];",
        "const float send = upper ? v[i + kHalf] : v[i];",
        ORACLE,
    ),
    "a reduction that leaves out a lane": Bug(
        REDUCE,
        "for (int mask = kWarp / 2; mask > 0; mask /= 2) {",
        "for (int mask = kWarp / 2; mask > 1; mask /= 2) {",
        ORACLE,
    ),
    "shared memory that one warp leaves unwritten": Bug(
        REDUCE,
        "if (lane == 0) shared[warp * Q + q] = total;",
        "if (lane == 0 && warp > 0) shared[warp * Q + q] = total;",
        r"uninitialised: reads .*`shared`",
    ),
    "two blocks that write the same partial sums": Bug(
        MOMENTS,
        "partials[e.col_partial + (r.row_block * Q + q) * e.cols + r.col_begin + c] = total;",
        "partials[e.col_partial + q * e.cols + r.col_begin + c] = total;",
        r"race: writes .*the workspace(.|\n)*another block",
    ),
    "partial sums that nobody writes": Bug(
        MOMENTS,
        "block_sum_to(wide, shared, partials + tile * Q);",
        "block_sum_to(wide, shared, partials + (tile + 1) * Q);",
        r"(uninitialised: reads .*|out of bounds: writes .*|race: .*)the workspace",
    ),
    "a vector load from an unaligned row": Bug(
        MOMENTS,
        "if (e.aligned && left >= N) {",
        "if (left >= N) {",
        r"misaligned: reads 16 bytes",
    ),
    "a vector load from a row of an unaligned matrix": Bug(
        MOMENTS,
        "if (e.aligned && left - c >= N) {",
        "if (left - c >= N) {",
        r"misaligned: reads 16 bytes",
    ),
    "a ragged strip that is read in vectors": Bug(
        MOMENTS,
        "const bool whole = e.aligned && (r.col_end - r.col_begin) % N == 0;",
        "const bool whole = e.aligned;",
        f"{ORACLE}|out of bounds: reads",
    ),
    "lanes behind the end that count": Bug(
        MOMENTS,
        "sums[p * kPadded + q] = left > 0 ? row_sums[q] : 0.0f;",
        "sums[p * kPadded + q] = row_sums[q];",
        ORACLE,
    ),
    "whole packs that are counted one too many": Bug(
        MOMENTS,
        "done = (left - N) / kStep + 1;",
        "done = left / kStep + 1;",
        r"out of bounds: reads",
    ),
    "rows left over by the unrolled loop": Bug(
        MOMENTS,
        "for (; count >= kWarps; count -= kWarps) rows.template add<true, 1>(columns);",
        "for (; count >= 2 * kWarps; count -= kWarps) rows.template add<true, 1>(columns);",
        f"{ORACLE}|uninitialised: reads",
    ),
}


def check(run: Runner) -> None:
    problems = [make([(270, 140), (3, 33)], 2, axis) for axis in ("tensor", "both")]
    problems.append(make([(41, 2062)], 1, "both"))
    flat = torch.randn(47 * 91 + 1)[1:].view(47, 91)  # unbroken, from an unaligned start
    padded = torch.full((21, 64), float("nan"))  # rows on 16-byte borders with a ragged end
    padded[:, :38] = torch.randn(21, 38)
    problems.append(Problem([flat], [[flat]], "tensor"))
    problems.append(Problem([padded[:, :38]], [[padded[:, :38]]], "both"))
    view = torch.randn(40, 90)[:, 3:80]
    problems.append(Problem([view], [[view]], "tensor"))
    assert_equals_oracle(run, problems)


TARGET = Target(["moments"], FLOAT_ONLY, check)


def test_the_unmodified_kernel_passes(tmp_path):
    TARGET.passes(tmp_path)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(tmp_path, name):
    TARGET.finds(tmp_path, BUGS[name])

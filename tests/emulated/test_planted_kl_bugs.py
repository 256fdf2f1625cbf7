"""Bugs planted into copies of the KL kernel are found; the check that finds each is named."""

from __future__ import annotations

import pytest
import torch

from .emulator import Runner
from .kl_divergence_cases import Problem, assert_equals_oracle, make
from .planted import ORACLE, Bug, Target

pytestmark = pytest.mark.usefixtures("needs_a_compiler")

KL, VEC = "cuda/kl_divergence.cu", "cuda/common/vec.cuh"

# Fewer instantiations: only float32 is compiled. No bug, and part of every copy.
FLOAT_ONLY = [
    (
        KL,
        "    case DType::bf16: return kernels<S, bf16>();\n"
        "    default: return kernels<S, f16>();\n",
        "    default: return {};\n",
    ),
    (
        KL,
        "    case DType::bf16: return choose_teacher<bf16>(p.teacher_dtype);\n"
        "    default: return choose_teacher<f16>(p.teacher_dtype);\n",
        "    default: return {};\n",
    ),
]
# A device on which a ring holds four chunks: longer rows are kept in part and loaded again.
SMALL_DEVICE = ("cuda/common/device.cuh", '_SHARED_KB", 227)', '_SHARED_KB", 70)')

BUGS = {
    "no barrier before the warps' sums are read": Bug(
        KL,
        "  __syncthreads();\n  static_assert(kWarps <= kWarp",
        "  static_assert(kWarps <= kWarp",
        r"(race|uninitialised): reads .*`shared`",
    ),
    "one place for the warps' sums of all rows": Bug(
        KL,
        "block_totals(own, shared[turn]);\n    if (threadIdx.x == kThreads - 1) {\n"
        "      p.out[row] = kl_value(totals.sums, Exponential<kFast>::kUnit);\n"
        "    }\n    if (!wanted)",
        "block_totals(own, shared[0]);\n    if (threadIdx.x == kThreads - 1) {\n"
        "      p.out[row] = kl_value(totals.sums, Exponential<kFast>::kUnit);\n"
        "    }\n    if (!wanted)",
        r"race: \w+ .*`shared`",
    ),
    "sums that stay behind when the references move": Bug(
        KL,
        "  own.move_to({warp_max(own.references.student), ",
        "  own.references = KlMaxima({warp_max(own.references.student), ",
        ORACLE,
    ),
    "references that never move": Bug(
        KL, "      move_to({fmaxf(", "      if (false) move_to({fmaxf(", ORACLE
    ),
    "columns behind the end that count": Bug(
        KL, "? student.at(i) : -INFINITY;", "? student.at(i) : 0.0f;", ORACLE
    ),
    "a bound that is one too large": Bug(
        KL,
        "read(col, static_cast<int>(min(p.vocabulary - col, int64_t{N})));\n      own.add",
        "read(col, static_cast<int>(min(p.vocabulary + 1 - col, int64_t{N})));\n      own.add",
        r"out of bounds: reads|race: writes",
    ),
    "a vector path for unaligned rows": Bug(
        VEC,
        "  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&\n",
        "  return reinterpret_cast<uintptr_t>(data) % 4 == 0 &&\n",
        r"misaligned: the source of an asynchronous copy",
    ),
    "a vector store at a ragged end": Bug(
        KL,
        "store_gradient<false>(out + int64_t{chunk} * kStep, s, left);",
        "store_gradient<true>(out + int64_t{chunk} * kStep, s, left);",
        f"{ORACLE}|out of bounds: writes|race: writes",
    ),
    "a copy past a ragged end": Bug(
        KL,
        "cp_async16(&to->chunks[c], from + c * kPart, valid);",
        "cp_async16(&to->chunks[c], from + c * kPart);",
        r"out of bounds: reads|race: reads",
    ),
    "a chunk that is read before it has arrived": Bug(
        KL, "cp_async_wait<ring_size(kIndex) - 1>();\n  } else {",
        "cp_async_wait<ring_size(kIndex) + 1>();\n  } else {", r"uninitialised: reads|cp.async"
    ),
    "a slot that is filled again while it is needed": Bug(
        KL, "if (chunk < plan.chunks - plan.kept) {", "if (chunk <= plan.chunks - plan.kept) {",
        f"{ORACLE}|cp.async|uninitialised: reads"
    ),
    "chunks that are loaded again in the wrong order": Bug(
        KL, ": plan.chunks + plan.again - 1 - next;", ": next - plan.chunks;", ORACLE
    ),
    "a pass 2 that starts with the wrong chunk": Bug(
        KL, "step < plan.kept ? plan.again + step :", "step < plan.kept ? step :",
        f"{ORACLE}|uninitialised: reads .*dynamic shared memory"
    ),
    "two blocks on one row": Bug(
        KL,
        "row < p.rows; row += gridDim.x, turn ^= 1) {\n    const S* student",
        "row < p.rows; row += 1, turn ^= 1) {\n    const S* student",
        r"race: \w+ (.|\n)*another block",
    ),
    "an infinity that meets a factor of 0": Bug(
        "common/kl_value.h",
        "if (factor == 0) return Float{0};",
        "",
        ORACLE,
    ),
    "differences that keep their old references": Bug(
        "common/kl_value.h", "? cross : cross - apart * teacher", "? cross : cross", ORACLE
    ),
    "an infinity without probability that counts": Bug(
        KL, "pack_cross = e[i] == 0.0f ? pack_cross : ", "pack_cross = ", ORACLE
    ),
}  # fmt: skip


def check(run: Runner) -> None:
    problems = [make((3, 2100)), make((4, 5001)), make((3, 8448)), make((3, 12288))]
    wide = torch.full((4, 2112), float("nan"))  # rows on 16-byte borders with a ragged end
    wide[:, :2101] = torch.randn(4, 2101)
    shifted = torch.randn(6, 96)[:, 3:80]  # aligned strides from an unaligned start
    problems.append(Problem(shifted, torch.randn(6, 80)[:, :77], torch.ones(6)))
    problems.append(Problem(wide[:, :2101], torch.randn(4, 2112)[:, :2101], torch.ones(4)))
    view = torch.randn(6, 90)[:, 3:80]
    problems.append(Problem(view, torch.randn(6, 77), torch.ones(6)))
    vanishing = make((1, 5000))
    vanishing.student[0, 4990] = vanishing.teacher[0, 4990] = 900  # underflows in float64 too
    vanishing.student[0, 0] = -float("inf")
    vanishing.teacher[0, 0] = -30
    problems.append(vanishing)
    assert_equals_oracle(run, problems)


TARGET = Target(["kl_divergence"], [*FLOAT_ONLY, SMALL_DEVICE], check)


def test_the_unmodified_kernel_passes(tmp_path):
    TARGET.passes(tmp_path)


def test_more_rows_than_blocks(tmp_path):
    """Two blocks share all rows: no bug, only a smaller grid than the kernel's own limit."""
    small = (KL, "constexpr int64_t kMaxBlocks = 16384;", "constexpr int64_t kMaxBlocks = 2;")
    TARGET.passes(tmp_path, [small])


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(tmp_path, name):
    TARGET.finds(tmp_path, BUGS[name])

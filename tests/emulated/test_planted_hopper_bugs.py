"""Bugs planted into copies of csrc/cuda/wgrad_moments_sm90.cu are found; each names the check."""

from __future__ import annotations

import functools

import pytest
import torch

from .emulator import Runner
from .planted import ORACLE, Bug, Target
from .wgrad_moments_cases import assert_equals_oracle, make

pytestmark = pytest.mark.usefixtures("needs_a_compiler")

SM90, WGRAD = "cuda/wgrad_moments_sm90.cu", "cuda/wgrad_moments.cu"
WRITTEN_LATE = r"(race|uninitialised|overwritten copy): "

# No bugs, and part of every copy: only bfloat16 with one reference is compiled, and small shapes
# already have several samples per unit of work, and several units per block.
SMALL = [
    (
        WGRAD,
        "    case DType::f32: return choose_refs<float, float>(batch, device, stream);\n"
        "    case DType::bf16: return choose_ref_dtype<bf16>(p, batch, device, stream);\n"
        "    default: return choose_ref_dtype<f16>(p, batch, device, stream);\n",
        "    default: return choose_axis<bf16, bf16, 2>(batch, device, stream);\n",
    ),
    (WGRAD, "constexpr int64_t kEnoughBlocks = 512;", "constexpr int64_t kEnoughBlocks = 2;"),
    (
        SM90,
        "    case 0: return run_kernel<T, 0>(batch, multiprocessors, stream);\n"
        "    case 1: return run_kernel<T, 1>(batch, multiprocessors, stream);\n"
        "    default: return run_kernel<T, 2>(batch, multiprocessors, stream);\n",
        "    default: return run_kernel<T, 1>(batch, multiprocessors, stream);\n",
    ),
    (SM90, "run<f16>(batch", "run<bf16>(batch"),
]

BUGS = {
    # ---- tails ---------------------------------------------------------------------------------
    "rows behind the last token not cleared": Bug(
        SM90, "for (int row = left; row <", "for (int row = kSlab; row <", ORACLE
    ),
    "one row behind the last token not cleared": Bug(
        SM90, "for (int row = left; row <", "for (int row = left + 1; row <", ORACLE
    ),
    "no proxy fence between clearing and wgmma": Bug(
        SM90,
        "        fence_async_proxy();\n",
        "",
        r"missing fence: wgmma reads .*\n.* does not call fence_async_proxy",
    ),
    "a proxy fence before the stores": Bug(
        SM90,
        "          store_shared_zeros(to + row * kRowBytes);\n        }\n"
        "        fence_async_proxy();\n",
        "          fence_async_proxy();\n"
        "          store_shared_zeros(to + row * kRowBytes);\n        }\n",
        r"missing fence: wgmma reads",
    ),
    "lanes that clear do not wait for each other": Bug(
        SM90,
        "        fence_async_proxy();\n        __syncwarp();\n",
        "        fence_async_proxy();\n",
        r"race: (wgmma reads|writes 16 bytes) .*\n  thread \d+ (writes|copies to) it",
    ),
    "clearing before the slab has arrived": Bug(
        SM90,
        "        mbarrier_wait(shared.landed(ring.slot), parities >> ring.slot & 1);\n",
        "",
        WRITTEN_LATE,
    ),
    "a slab that needs clearing handed on at once": Bug(
        SM90, "cleared ? shared.landed(ring.slot) : shared.full(ring.slot);",
        "shared.full(ring.slot); (void)cleared;", r"(deadlock|mbarrier): ",
    ),
    # ---- the ring ------------------------------------------------------------------------------
    "no wait for the slab": Bug(
        SM90, "        mbarrier_wait(shared.full(ring.slot), ring.parity);\n", "",
        r"(uninitialised|race): wgmma reads",
    ),
    "no wait for an empty slot": Bug(
        SM90, "        mbarrier_wait(shared.empty(ring.slot), ring.parity ^ 1);\n", "",
        rf"({WRITTEN_LATE}|mbarrier: )",
    ),
    "a slot released while wgmma may read it": Bug(
        SM90, "          wgmma_wait<kInFlight>();\n", "          wgmma_wait<kInFlight + 1>();\n",
        r"race: starts a copy to .*\n  a wgmma of warpgroup \d reads it",
    ),
    "the newest slot released in place of the oldest": Bug(
        SM90,
        "if (thread == 0) mbarrier_arrive(shared.empty(oldest.slot));\n"
        "          oldest.advance(b.slots);",
        "if (thread == 0) mbarrier_arrive(shared.empty((ring.slot + b.slots - 1) % b.slots));\n"
        "          oldest.advance(b.slots);",
        rf"({WRITTEN_LATE}|deadlock: |mbarrier: )",
    ),
    "slots of a sample's end released once too few": Bug(
        SM90, "      if (thread < in_flight) {", "      if (thread + 1 < in_flight) {",
        r"deadlock: .*(\n.*)* of 2 arrivals",
    ),
    "slots released by one warpgroup only": Bug(
        SM90, "mbarrier_init(shared.empty(slot), kGroups);",
        "mbarrier_init(shared.empty(slot), 1);", rf"({WRITTEN_LATE}|deadlock: |mbarrier: )",
    ),
    "too many arrivals awaited": Bug(
        SM90, "mbarrier_init(shared.empty(slot), kGroups);",
        "mbarrier_init(shared.empty(slot), kGroups + 1);",
        r"deadlock: no thread can run:(\n.*)* waits at csrc/cuda/wgrad_moments_sm90.cu:\d+ for "
        r"phase \d+ of the mbarrier, 8 bytes at byte \d+ of shared variable `barriers`",
    ),
    "too many bytes expected": Bug(
        SM90, "mbarrier_expect(arrived, steps * (kSlabBytes / kSteps));",
        "mbarrier_expect(arrived, steps * (kSlabBytes / kSteps) + 16);",
        r"deadlock: .*(\n.*)* and 16 bytes of copies",
    ),
    "too few bytes expected": Bug(
        SM90, "mbarrier_expect(arrived, steps * (kSlabBytes / kSteps));",
        "mbarrier_expect(arrived, kSlabBytes / kSteps);",
        rf"({WRITTEN_LATE}|bulk copy: .* expected too few bytes)",
    ),
    "boxes with more tokens than expected": Bug(
        SM90, "&b.dy[steps - 1]", "&b.dy[kSteps - 1]", r"(deadlock|bulk copy|out of bounds): "
    ),
    "the parity of a pass forgotten": Bug(
        SM90, "      slot = 0;\n      parity ^= 1;\n", "      slot = 0;\n",
        rf"({WRITTEN_LATE}|deadlock: |mbarrier: )",
    ),
    # ---- references ----------------------------------------------------------------------------
    "no wait for the references": Bug(
        SM90, "      mbarrier_wait(shared.refs_full(group), refs_parity);\n", "",
        r"(uninitialised|race): reads",
    ),
    "references released before all lanes have read them": Bug(
        SM90, "      read_refs<T, K>(b, refs_shared, refs);\n      __syncwarp();\n",
        "      read_refs<T, K>(b, refs_shared, refs);\n",
        r"race: starts a copy to .*\n  thread \d+ reads it",
    ),
    "references read without the swizzle": Bug(
        SM90, "(n % 8 ^ g) * 16", "n % 8 * 16", ORACLE
    ),
    "float32 references read without the swizzle": Bug(
        SM90, "((2 * (n % 4) + t / 2) ^ g) * 16", "(2 * (n % 4) + t / 2) * 16", ORACLE
    ),
    "float8 references read without the swizzle": Bug(
        SM90, "(n / 2 ^ g) * 16", "n / 2 * 16", ORACLE
    ),
    "boxes off their border": Bug(
        SM90, "raw + (-shared_address(raw) & (kAlignment - 1));", "raw;", ORACLE
    ),
    "the first expert's references for every expert": Bug(
        SM90, "u.expert, shared.refs_full(group)", "0, shared.refs_full(group)", ORACLE
    ),
    # ---- products and sums ---------------------------------------------------------------------
    "sums read before the product has ended": Bug(
        SM90, "      wgmma_wait<0>();\n", "", rf"({ORACLE}|wgmma: |race: )"
    ),
    "sums carried over to the next sample": Bug(
        SM90, "const int add = left < length;", "const int add = s != u.first || left < length;",
        ORACLE,
    ),
    "strides of an operand exchanged": Bug(
        SM90, "wgmma_operand(shared.slabs + 2 * kBoxBytes, kBoxBytes, 8 * kRowBytes);",
        "wgmma_operand(shared.slabs + 2 * kBoxBytes, 8 * kRowBytes, kBoxBytes);",
        rf"({ORACLE}|uninitialised|race|out of bounds)",
    ),
    "half a step between the steps of a group": Bug(
        SM90, "wgmma_m64n128<T, 4>(d, dy + next, x + next, add, kStep * kRowBytes)",
        "wgmma_m64n128<T, 4>(d, dy + next, x + next, add, 8 * kRowBytes)", ORACLE,
    ),
    "a warp that leaves out a product": Bug(
        SM90, "          case 1: wgmma_m64n128<T, 1>",
        "          case 1: if (warp == 3) break; wgmma_m64n128<T, 1>",
        r"(deadlock: .*(\n.*)* in wgmma of its warpgroup|warpgroup: )",
    ),
    "sums behind the edge kept": Bug(
        SM90, "      if (cut) clear_behind_the_edge(d, rows, cols);\n", "", ORACLE
    ),
    "sums overwritten before they are read": Bug(
        SM90, "      mbarrier_wait(shared.sums_empty(group), sums_parity ^ 1);\n", "",
        r"(race: |mbarrier: )",
    ),
    "sums read before they are written": Bug(
        SM90, "      mbarrier_wait(shared.sums_full(group), parity);\n", "",
        r"(uninitialised|race): reads",
    ),
    "lanes that write sums do not wait for each other": Bug(
        SM90, "      __syncwarp();\n      if (lane == 0) mbarrier_arrive(shared.sums_full(group));",
        "      if (lane == 0) mbarrier_arrive(shared.sums_full(group));", r"(race|uninitialised): ",
    ),
    # ---- tensor maps ---------------------------------------------------------------------------
    "rows of x off 16-byte borders taken": Bug(
        SM90, "starts_aligned(p.x, p.x_stride, 2) && starts_aligned(p.dy, p.dy_stride, 2) &&",
        "starts_aligned(p.dy, p.dy_stride, 2) &&", r"tensor map: a stride must be a multiple of 16"
    ),
    "references off 16-byte borders taken": Bug(
        SM90, "takes = takes && starts_aligned(p.refs[k], p.ref_strides[k], bytes) &&",
        "takes = takes &&", r"tensor map: a stride must be a multiple of 16",
    ),
    "a width in bytes for one in elements": Bug(
        SM90, "p.dtype, p.in_features, rows, p.x_stride, 1,",
        "p.dtype, 2 * p.in_features, rows, p.x_stride, 1,", rf"({ORACLE}|out of bounds: reads)",
    ),
    # ---- the start -----------------------------------------------------------------------------
    "mbarriers unknown to the copy engine": Bug(
        SM90, "    mbarrier_init_fence();\n", "", r"missing fence: the copy engine"
    ),
    "mbarriers used before they are initialised": Bug(
        SM90, "  __syncthreads();\n", "", r"(race|mbarrier|uninitialised): "
    ),
}  # fmt: skip


def check(run: Runner) -> None:
    lengths = (17, 0, 70, 1, 64, 130)
    wide = make((136, 328), (*lengths, 9), 1)
    wide.x[-9:] = wide.dy[-9:] = float("nan")  # tokens of nobody
    wide.starts, wide.lengths = wide.starts[:-1], wide.lengths[:-1]
    problems = [wide]
    problems += [
        make((72, 136), (9, 40, 5), 1, "row", experts=(1, 0, 1)),
        make((64, 64), (5,), 1, ref_dtype=torch.float32),
        make((64, 64), (5,), 1, ref_dtype=torch.float8_e4m3fn),
    ]
    infinite = make((72, 72), (3, 20), 1)
    infinite.dy[1, 2] = infinite.x[6, 3] = float("inf")
    problems.append(infinite)
    # These take wgrad_moments.cu: rows of x, then of the reference, off 16-byte borders.
    problems += [make((64, 65), (5,), 1), make((64, 72), (5,), 1)]
    problems[-2].refs = [torch.randn(64, 72).bfloat16()[:, :65]]
    problems[-1].refs = [torch.randn(64, 75).bfloat16()[:, :72]]
    assert_equals_oracle(functools.partial(run, device={"CAPABILITY": 90, "SMS": 2}), problems)


TARGET = Target(["wgrad_moments", "wgrad_moments_sm90"], SMALL, check)


def test_the_unmodified_kernel_passes(tmp_path):
    TARGET.passes(tmp_path)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(tmp_path, name):
    TARGET.finds(tmp_path, BUGS[name])

"""Bugs planted into copies of csrc/cuda/wgrad_moments.cu are found; each names the check."""

from __future__ import annotations

import functools

import pytest

from .emulator import Runner
from .planted import ORACLE, Bug, Target
from .wgrad_moments_cases import Problem, assert_equals_oracle, make

pytestmark = pytest.mark.usefixtures("needs_a_compiler")

WGRAD = "cuda/wgrad_moments.cu"
PRODUCT, REFS = "cuda/common/tile_product.cuh", "cuda/common/tile_refs.cuh"
LOADS, REDUCE = "cuda/common/tile_loads.cuh", "cuda/common/reduce.cuh"
PARTS, FINISH = "cuda/common/sample_parts.cuh", "cuda/common/finish_wgrad.cuh"

# No bugs, and part of every copy: only bfloat16 with two references of its own type is compiled,
# and small shapes already take several launches, samples per block and bands of tiles.
SMALL = [
    (
        WGRAD,
        "    case DType::f32: return choose_refs<float, float>(batch, device, stream);\n"
        "    case DType::bf16: return choose_ref_dtype<bf16>(p, batch, device, stream);\n"
        "    default: return choose_ref_dtype<f16>(p, batch, device, stream);\n",
        "    default: return choose_axis<bf16, bf16, 2>(batch, device, stream);\n",
    ),
    (PARTS, "constexpr int kMaxSamples = 1024;", "constexpr int kMaxSamples = 5;"),
    (WGRAD, "constexpr int64_t kEnoughBlocks = 512;", "constexpr int64_t kEnoughBlocks = 2;"),
    (WGRAD, "constexpr int kBandRows = 16;", "constexpr int kBandRows = 2;"),
]

BUGS = {
    "no wait for the asynchronous copies": Bug(
        WGRAD,
        "      if (stages == kMostStages) cp_async_wait<kMostStages - 2>(); "
        "else cp_async_wait<0>();\n",
        "",
        r"in flight",
    ),
    "a wait for one group too few": Bug(
        WGRAD,
        "cp_async_wait<kMostStages - 2>();",
        "cp_async_wait<kMostStages - 1>();",
        r"in flight",
    ),
    "a wait for one group too few with two stages": Bug(
        WGRAD, "cp_async_wait<0>();", "cp_async_wait<1>();", r"in flight"
    ),
    "no group for the iterations that load nothing": Bug(
        WGRAD,
        "    }\n    cp_async_commit();  // empty at the end\n",
        "      cp_async_commit();\n    }\n",
        r"in flight",
    ),
    "no barrier between a stage's arrival and its use": Bug(
        WGRAD,
        "      __syncthreads();  // the stage has arrived, and the last one is no longer read\n",
        "",
        r"(race|uninitialised): \w+ .*dynamic shared memory",
    ),
    "a stage that is loaded too early": Bug(
        WGRAD,
        "for (int i = 0; i < stages - 1; ++i) load_next();",
        "for (int i = 0; i < stages; ++i) load_next();",
        r"(race|uninitialised): \w+ .*dynamic shared memory",
    ),
    "no barrier before a stage becomes the stash": Bug(
        WGRAD,
        "      __syncthreads();  // all warps are done with the operands\n",
        "",
        r"race: \w+ .*dynamic shared memory",
    ),
    "dy loaded without the transposition": Bug(
        PRODUCT, "ldmatrix_trans(a[m],", "ldmatrix(a[m],", ORACLE
    ),
    "x loaded without the transposition": Bug(
        PRODUCT, "ldmatrix_trans(b[n],", "ldmatrix(b[n],", ORACLE
    ),
    "the middle parts of dy's fragments exchanged": Bug(
        PRODUCT,
        "stage + (quarter / 2 * 8 + row) * (kOut * 2)",
        "stage + (quarter % 2 * 8 + row) * (kOut * 2)",
        ORACLE,
    ),
    "places mixed up between writing and reading": Bug(
        PRODUCT,
        "const int x_chunk = (place.warp_col / 8 + quarter / 2) ^ Mixed::of(row);",
        "const int x_chunk = place.warp_col / 8 + quarter / 2;",
        ORACLE,
    ),
    "rows of the next sample not replaced by zeros": Bug(
        LOADS,
        "if (rows >= kRows) {",
        "if (rows >= 0) {",
        rf"({ORACLE}|out of bounds: reads)",
    ),
    "rows of the next sample not replaced by zeros, element by element": Bug(
        LOADS,
        "const int valid = row < rows ? valid_ : 0;",
        "const int valid = valid_;",
        rf"({ORACLE}|out of bounds: reads)",
    ),
    "columns behind the edge not replaced by zeros": Bug(
        LOADS, "valid_ = clamp_count(columns, col_, kCount);", "valid_ = kCount;",
        rf"({ORACLE}|out of bounds: reads)",
    ),
    "rows of a thread that are mixed alike, but not by its own row": Bug(
        LOADS, "(chunk ^ Mixed::of(row_))", "(chunk ^ Mixed::of(row_ + 1))", ORACLE
    ),
    "sums behind the edge kept": Bug(WGRAD, "    clear_behind_the_edge();\n", "", ORACLE),
    "sums carried over to the next sample": Bug(
        WGRAD, "    tile.clear();\n", "    if (sample == first) tile.clear();\n", ORACLE
    ),
    "the same tile of the references for every row of tiles": Bug(
        WGRAD, "Refs::load(to + k * Refs::kBytes, from, batch.ref_dtype, row0,",
        "Refs::load(to + k * Refs::kBytes, from, batch.ref_dtype, 0,",
        rf"({ORACLE}|out of bounds: reads)",
    ),
    "both references at one place": Bug(
        REFS, "from + k * kBytes + m * (16 * kRowBytes)", "from + m * (16 * kRowBytes)", ORACLE
    ),
    "a column of fragments read twice from the references": Bug(
        REFS, "(chunk ^ n) * kChunkBytes;", "(chunk ^ (n & 4)) * kChunkBytes;", ORACLE
    ),
    "an empty sample that is skipped by the loads only": Bug(
        WGRAD,
        "    ++sample;\n  }",
        "    do ++sample;\n"
        "    while (sample < batch.samples && !batch.lengths[sample]);\n  }",
        rf"({ORACLE}|in flight|uninitialised|race)",
    ),
    "a sample computed by no block": Bug(
        WGRAD,
        "sample < last; ++sample) {",
        "sample < last; sample += 2) {",
        r"(uninitialised: reads .*the workspace|in flight|race)",
    ),
    "a launch that forgets which results it fills": Bug(
        PARTS,
        "rows.of[next] = static_cast<int32_t>(samples[i]);",
        "rows.of[next] = next;",
        rf"({ORACLE}|uninitialised)",
    ),
    "a part that goes on into the samples of the next": Bug(
        WGRAD, "last = batch.firsts[part + 1];", "last = batch.samples;", r"race: writes"
    ),
    "the first expert's references for every expert": Bug(
        WGRAD, " + expert * batch.expert_bytes[k];", ";", ORACLE
    ),
    "experts of the list for parts in their order": Bug(
        PARTS,
        "to.experts[to.parts] = static_cast<int32_t>(expert(first));",
        "to.experts[to.parts] = static_cast<int32_t>(p.experts ? p.experts[to.parts] : 0);",
        ORACLE,
    ),
    "samples of a launch that are not sorted by expert": Bug(
        WGRAD, "groups.order() + begin", "groups[0].samples", rf"({ORACLE}|uninitialised)"
    ),
    "a band of tiles that is thought to be full": Bug(
        WGRAD,
        "min(b.row_tiles - band * kBandRows, int64_t{kBandRows})",
        "int64_t{kBandRows}",
        r"(uninitialised: reads|out of bounds|race: writes)",
    ),
    "a group of lanes that gives its halves away": Bug(
        REDUCE,
        "detail::halve<M / 2, kLanes * kStride / 2, kStride>",
        "detail::halve<M / 2, kLanes * kStride / 4, kStride>",
        ORACLE,
    ),
}  # fmt: skip


def check(run: Runner) -> None:
    lengths = (33, 0, 1, 40, 16, 7, 70)
    problems = [make((300, 40), lengths, 2, axis) for axis in ("tensor", "both")]
    problems.append(make((37, 136), lengths, 2, "both"))  # rows of dy off 16-byte borders
    problems.append(make((37, 136), lengths, 2, "tensor", experts=(3, 0, 3, 1, 1, 3, 0)))
    infinite = make((24, 40), (3, 5), 2, "both")
    infinite.dy[1, 2] = infinite.x[6, 3] = float("inf")
    problems.append(infinite)
    inner = make((24, 40), (60,), 2)  # rows of others behind each sample
    problems.append(Problem(inner.x, inner.dy, [0, 20], [9, 33], inner.refs))
    for problem in problems:  # most bugs are found in the first one
        assert_equals_oracle(run, [problem])
    two_stages = functools.partial(run, device={"SHARED_KB": 99})
    assert_equals_oracle(two_stages, [problems[0], problems[2]])


TARGET = Target(["wgrad_moments", "wgrad_moments_sm90"], SMALL, check)


def test_the_unmodified_kernel_passes(tmp_path):
    TARGET.passes(tmp_path)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(tmp_path, name):
    TARGET.finds(tmp_path, BUGS[name])

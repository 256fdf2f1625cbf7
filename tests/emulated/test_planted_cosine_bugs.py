"""Bugs planted into copies of csrc/cuda/cosine_topk.cu are found; each names the check."""

from __future__ import annotations

import pytest
import torch

from .cosine_topk_cases import DTYPES, Problem, assert_equals_oracle, make
from .emulator import Runner
from .planted import ORACLE, Bug, Target

pytestmark = pytest.mark.usefixtures("needs_a_compiler")

TOPK, TILE = "cuda/cosine_topk.cu", "cuda/common/cosine_tile.cuh"
KEY, SCALE = "common/topk_key.h", "common/cosine_scale.h"

# No bugs, and part of every copy: small shapes already take several batches, slabs and folds.
SMALL = [
    (TOPK, "constexpr int64_t kBatch = 1024;", "constexpr int64_t kBatch = 64;"),
    (TOPK, "constexpr int64_t kSlab = 4096;", "constexpr int64_t kSlab = 64;"),
    (TOPK, "constexpr int kFold = 256;", "constexpr int kFold = 64;"),
]

BUGS = {
    "no barrier between a stage's arrival and its use": Bug(
        TOPK,
        "      __syncthreads();\n      tile.load(ahead",
        "      tile.load(ahead",
        r"(race|uninitialised): \w+ .*`stages`",
    ),
    "one buffer for all stages": Bug(
        TOPK, "d += Tile::kStep, use ^= 1)", "d += Tile::kStep)", r"race: \w+ .*`stages`"
    ),
    "a stage that is loaded twice": Bug(
        TOPK, "tile.load(ahead, d + Tile::kStep);", "tile.load(ahead, d);", ORACLE
    ),
    "chains that are counted again": Bug(TOPK, "          sums[m][n][e] = 0;\n", "", ORACLE),
    "features behind the end not replaced by zeros": Bug(
        TILE,
        "clamp_count(features, at, kCount);",
        "kCount;",
        rf"({ORACLE}|out of bounds: reads|misaligned)",
    ),
    "a query that does not exist": Bug(
        TILE, "const bool exists = vector < from.count;", "const bool exists = true;",
        r"(out of bounds|uninitialised): reads",
    ),
    "a vector load from an unaligned row": Bug(
        TILE, "if (aligned && valid == kCount) {", "if (valid == kCount) {", r"misaligned"
    ),
    "rows scaled by the queries' factors": Bug(
        TILE, "exists ? from.scales[vector] : 0.0f;", "exists ? queries.scales[0] : 0.0f;", ORACLE
    ),
    "places mixed up between writing and reading": Bug(
        TILE, "stage + place_of(vector, k + quarter / 2)",
        "stage + vector * kVectorBytesInStage + (k + quarter / 2) * kChunkBytes", ORACLE,
    ),
    "the middle parts of the rows' fragments exchanged": Bug(
        TILE, "16 * n + quarter / 2 * 8 + row;", "16 * n + quarter % 2 * 8 + row;", ORACLE
    ),
    "the columns of a fragment exchanged": Bug(
        TILE, "b[n][e % 2].v[i]", "b[n][1 - e % 2].v[i]", ORACLE
    ),
    "bfloat16 that is not scaled": Bug(
        TILE, "__float_as_uint(widen(in.v[i]) * scale)", "__float_as_uint(widen(in.v[i]))", ORACLE
    ),
    "norms of the scaled vector taken for those of the stored one": Bug(
        TOPK, "1 / (sqrt(squares) * double{scale})", "1 / sqrt(squares)", ORACLE
    ),
    "a largest magnitude that misses lanes": Bug(
        TOPK,
        "  for (int mask = kWarp / 2; mask > 0; mask /= 2) {\n    largest",
        "  for (int mask = kWarp / 2; mask > 8; mask /= 2) {\n    largest",
        ORACLE,
    ),
    "a scale whose sign of the exponent is wrong": Bug(
        SCALE, "254 - exponent;", "exponent;", ORACLE
    ),
    "norms of the first slab for all of them": Bug(
        TOPK,
        "      status = norms(s.rows, p.features,",
        "      if (row == 0) status = norms(s.rows, p.features,",
        ORACLE,
    ),
    "NaN below every number": Bug(
        KEY, "return kNanBits | 0x80000000u;", "return 1;", ORACLE
    ),
    "negative scores in the wrong order": Bug(
        KEY, "bits | 0x80000000u : ~bits;", "bits | 0x80000000u : bits;", ORACLE
    ),
    "equal scores by the larger index": Bug(
        KEY, "| (0xffffffffu - row);", "| row;", rf"({ORACLE}|out of bounds)"
    ),
    "digits counted without a barrier": Bug(
        TOPK,
        "    __syncthreads();\n    if (threadIdx.x < kWarp) {\n      const Digit found",
        "    if (threadIdx.x < kWarp) {\n      const Digit found",
        r"race: \w+ .*`counts`",
    ),
    "a digit that is read before it is known": Bug(
        TOPK,
        "      if (threadIdx.x == 0) digit = found;\n    }\n    __syncthreads();\n",
        "      if (threadIdx.x == 0) digit = found;\n    }\n",
        r"(race|uninitialised): \w+ .*`digit`",
    ),
    "digits that are not cleared": Bug(
        TOPK,
        "    for (int i = threadIdx.x; i < kDigits; i += kSelectThreads) counts[i] = 0;\n",
        "    if (shift == 56) counts[threadIdx.x] = 0;\n",
        rf"({ORACLE}|race|uninitialised|out of bounds|shuffle|UndefinedBehavior|runtime error)",
    ),
    "a digit chosen from the wrong end": Bug(
        TOPK, "for (int i = kEach - 1; i >= 0; --i) {", "for (int i = 0; i < kEach; ++i) {",
        rf"({ORACLE}|uninitialised|out of bounds|runtime error)",
    ),
    "the keys of other prefixes counted": Bug(
        TOPK, "      if (((key ^ smallest) >> shift >> kDigitBits) != 0) continue;\n", "",
        rf"({ORACLE}|uninitialised|out of bounds|runtime error)",
    ),
    "a list of the earlier slabs that is forgotten": Bug(
        TOPK,
        "select.seen = static_cast<int32_t>(std::min(p.k, row));",
        "select.seen = 0;",
        rf"({ORACLE}|uninitialised)",
    ),
    "indices counted from the slab": Bug(
        TOPK, "select.first_row = static_cast<uint32_t>(row);", "select.first_row = 0;",
        ORACLE,
    ),
    "a sort that leaves a step out": Bug(
        TOPK, "step > 0; step /= 2) {", "step > 1; step /= 2) {",
        rf"({ORACLE}|order dependence)",
    ),
    "a step of the sort without a barrier": Bug(
        TOPK,
        "          keys[high] = a;\n        }\n      }\n      __syncthreads();\n",
        "          keys[high] = a;\n        }\n      }\n",
        r"race: \w+ ",
    ),
    "keys that replace the list while it is read": Bug(
        TOPK,
        "    if (key >= smallest) keys[atomicAdd(&taken, 1)] = key;\n",
        "    if (key >= smallest) best[atomicAdd(&taken, 1)] = keys[taken] = key;\n",
        r"(race|uninitialised)",
    ),
    "a batch that writes over the results of the first": Bug(
        TOPK,
        "select.out_scores = call.scores + query * p.k;",
        "select.out_scores = call.scores;",
        rf"({ORACLE}|uninitialised)",
    ),
}  # fmt: skip


def check(run: Runner) -> None:
    problems = [make(70, 150, 100, 40, torch.bfloat16), make(3, 131, 70, 100, torch.float16)]
    problems += [make(4, 140, 90, 33), make(2, 70, 41, 70, torch.float32, torch.float16)]
    for dtype in DTYPES:
        inner = torch.randn(80, 60).to(dtype)[:, 3:40]
        problems.append(Problem(inner[:5], inner[5:], 9))
        damaged = make(3, 90, 40, 12, dtype)
        damaged.rows[[4, 70]] = 0
        damaged.rows[[9, 66], [39, 3]] = float("inf")
        damaged.rows[80, 5] = damaged.queries[1, 0] = float("nan")
        problems.append(damaged)
        problems.append(Problem(damaged.queries[:1], damaged.rows[torch.arange(130) % 8], 90))
    for exponent in (-100, 100):
        long = make(3, 20, 40, 20, torch.bfloat16)
        long.rows *= 2.0**exponent
        problems.append(long)
        problems.append(Problem(long.queries.float(), long.rows.float(), 20))
    spread = make(3, 20, 40, 20)
    spread.queries[:, 20:23] *= 2.0**90
    spread.rows[:, 20:23] *= 2.0**90
    problems.append(spread)
    assert_equals_oracle(run, problems)


TARGET = Target(["cosine_topk"], SMALL, check)


def test_the_unmodified_kernel_passes(tmp_path):
    TARGET.passes(tmp_path)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(tmp_path, name):
    TARGET.finds(tmp_path, BUGS[name])

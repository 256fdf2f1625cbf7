"""csrc/cuda/cosine_topk.cu on the emulated grid, against the float64 oracle."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from gradsafe.ops import cosine_topk

from . import emulator
from .cosine_topk_cases import DTYPES, UNIT, Problem, assert_equals_oracle, make, solve

# Constants of csrc/cuda/cosine_topk.cu.
SLAB, BATCH, CHUNK = 4096, 1024, 2048  # kFirstSlab, kBatch, kChunk
QUERIES = (1, 5, 12)  # for rows that stream past one query or a few, and for tiles


@pytest.mark.parametrize(("dtype", "row_dtype"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("queries", QUERIES)
def test_every_dtype(emulate, dtype, row_dtype, queries):
    """Multiples of 64 features are aligned for every dtype."""
    problems = [make(queries, 70, d, 9, dtype, row_dtype) for d in (8, 33, 64, 300, 512)]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_in_both_directions(emulate, dtype):
    assert_equals_oracle(emulate, [make(70, 135, 40, 30, dtype), make(65, 64, 16, 1, dtype)])


@pytest.mark.parametrize("features", [1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 512, 530])
def test_every_number_of_features_around_the_borders_of_a_stage(emulate, features):
    problems = [make(q, 5, features, 4, dtype) for q in (3, 9) for dtype in DTYPES]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("features", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_around_the_borders_of_a_chunk(emulate, dtype, features):
    once = functools.partial(emulate, schedules=("forward",))
    assert_equals_oracle(once, [make(q, 5, features, 4, dtype) for q in QUERIES])


def test_more_features_than_a_float32_chain_of_a_lane_holds(emulate):
    once = functools.partial(emulate, schedules=("forward",))
    assert_equals_oracle(once, [make(2, 5, 8192 + 300, 3, dtype) for dtype in DTYPES])


def test_a_score_does_not_depend_on_the_tile(emulate, tmp_path):
    """65 queries take two tiles of 64, or one of 128 where many tiles are needed."""
    edit = ("cuda/cosine_topk.cu", "kFewTiles = 264;", "kFewTiles = 1;")
    program = emulator.build(emulator.planted(tmp_path, [edit]), only=["cosine_topk"])
    wide = functools.partial(emulator.run, program, schedules=("forward",))
    narrow = functools.partial(emulate, schedules=("forward",))
    problems = [make(65, 150, d, 40, dtype) for d in (70, 320) for dtype in DTYPES]
    assert_equals_oracle(wide, problems)
    for one, other in zip(solve(narrow, problems), solve(wide, problems), strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 63, 64, 65, 129, 200])
def test_every_k(emulate, k):
    assert_equals_oracle(emulate, [make(2, 200, 7, k)])


def test_nothing_to_do_and_next_to_nothing(emulate):
    sizes = [(0, 5, 4, 3), (3, 5, 4, 0), (3, 0, 4, 0), (3, 5, 0, 5), (1, 1, 1, 1)]
    assert_equals_oracle(emulate, [make(*s, dtype=d) for s in sizes for d in DTYPES])


def test_several_slabs_and_several_batches(emulate):
    """Once is enough; it takes seconds."""
    once = functools.partial(emulate, schedules=("random:2",))
    many_rows = make(2, 2 * SLAB + 70, 3, 40)
    many_rows.start = 2**40
    full = make(1, SLAB + 1, 2, 1024)
    many_queries = make(BATCH + 6, 5, 4, 3, torch.bfloat16)
    tiles = make(9, 2 * SLAB + 70, 3, 40, torch.bfloat16)
    assert_equals_oracle(once, [many_rows, full, many_queries, tiles])


@pytest.mark.parametrize("queries", [1, 9])
def test_rows_that_get_better_and_better(emulate, queries):
    """Every row of a later slab passes the filter, so more are left than are sorted at once."""
    angles = torch.linspace(3, 0.1, 2 * SLAB + 100)
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    problem = Problem(torch.tensor([[1.0, 0.0]]).repeat(queries, 1), rows, 300)
    once = functools.partial(emulate, schedules=("forward",))
    first, last = solve(once, [problem, Problem(-problem.queries, rows, 300)])
    assert torch.equal(first.indices, torch.arange(len(rows)).flip(0)[:300].expand(queries, -1))
    assert torch.equal(last.indices, torch.arange(300).expand(queries, -1))


def test_lists_are_those_of_the_parts(emulate):
    """More than a slab at once, or each slab by itself: the same scores, and so the same list."""
    whole = make(2, SLAB + 300, 4, 12)
    parts = [
        Problem(whole.queries, whole.rows[:SLAB], 12),
        Problem(whole.queries, whole.rows[SLAB:], 12, SLAB),
    ]
    once = functools.partial(emulate, schedules=("forward",))
    first, *rest = solve(once, [whole, *parts])
    scores = torch.cat([part.scores for part in rest], 1)
    indices = torch.cat([part.indices for part in rest], 1)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :12]
    assert torch.equal(first.scores, scores.gather(1, best))
    assert torch.equal(first.indices, indices.gather(1, best))


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_are_ordered_by_index(emulate, dtype, queries):
    problem = make(queries, 300, 20, 100, dtype)
    which = torch.randint(4, (300,))
    problem.rows = problem.rows[:4][which]
    problem.rows[which == 1] = 0
    found = solve(emulate, [problem])[0]
    exact = Problem(
        problem.queries, torch.stack([problem.rows[which == c][0] for c in range(4)]), 4
    )
    want = exact.cosines()[0][:, which].sort(dim=1, descending=True, stable=True).indices[:, :100]
    assert torch.equal(found.indices, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("queries", [5, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_damaged_vectors(emulate, dtype, queries, bad):
    problem = make(queries, 90, 40, 12, dtype)
    problem.queries[1] = 0
    problem.rows[[3, 80]] = 0
    whole = Problem(problem.queries, problem.rows, 90)
    problem.rows[[70, 11], [39, 0]] = bad
    problem.queries[4, 17] = bad
    assert_equals_oracle(emulate, [problem, whole])
    found = solve(emulate, [problem])[0]
    others = [i for i in range(queries) if i != 4]
    assert found.indices[others, :2].tolist() == [[11, 70]] * len(others)
    assert found.indices[4].tolist() == list(range(12))
    assert found.scores[4].isnan().all()
    assert torch.equal(found.scores[1, 2:], torch.zeros(10))


@pytest.mark.parametrize("exponent", [-133, -126, -33, 33, 124])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", QUERIES)
def test_the_length_of_a_vector_does_not_matter(emulate, dtype, exponent, queries):
    problem = make(queries, 20, 40, 20, dtype)
    rows = (problem.rows.double() * 4).round().clamp(-7, 7)
    problems = [Problem(problem.queries, (rows * 2.0**e).to(dtype), 20) for e in (0, exponent)]
    first, second = solve(emulate, problems)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.scores, second.scores)


def view(count: int, features: int, dtype: torch.dtype, left: int, width: int) -> torch.Tensor:
    """Vectors inside a wider matrix that holds NaN everywhere else."""
    whole = torch.full((count + 2, width), float("nan"), dtype=dtype)
    whole[1 : count + 1, left : left + features] = torch.randn(count, features).to(dtype)
    return whole[1 : count + 1, left : left + features]


@pytest.mark.parametrize(("dtype", "row_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_strides_and_alignments(emulate, dtype, row_dtype):
    even, odd, half = (8, 96), (3, 91), (4, 100)
    problems = [
        Problem(view(queries, 69, dtype, *query_at), view(35, 69, row_dtype, *row_at), 30)
        for queries in QUERIES
        for query_at, row_at in [(even, even), (odd, even), (even, odd), (odd, odd), (half, half)]
    ]
    assert_equals_oracle(emulate, problems)


def test_agrees_with_the_cpu(emulate):
    problem = make(20, 150, 600, 20)
    found = solve(emulate, [problem])[0]
    on_cpu = cosine_topk(problem.queries, problem.rows, 20)
    assert torch.all((found.scores - on_cpu.scores).abs() <= 20 * UNIT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(emulate, dtype):
    normalize = torch.nn.functional.normalize
    for queries in (4, 20):
        problem = make(queries, 64, 1024, 64, dtype)
        found = solve(emulate, [problem])[0]
        exact, _ = problem.cosines()
        ours = (found.scores - exact.gather(1, found.indices)).abs()
        plain = normalize(problem.queries, dim=1) @ normalize(problem.rows, dim=1).T
        assert ours.max() <= 2 * (plain - exact).abs().max()
        assert ours.mean() <= 2 * (plain - exact).abs().mean()


def test_under_address_sanitizer(emulate_asan):
    pairs = list(itertools.product(DTYPES, DTYPES))
    problems = [make(q, 70, 50, 33, a, b) for q in QUERIES for a, b in pairs]
    assert_equals_oracle(emulate_asan, problems)

"""csrc/cuda/wgrad_moments.cu on the emulated grid, against the float64 oracle."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from gradsafe.ops import AXES

from .wgrad_moments_cases import DTYPES, REF_DTYPES, Problem, assert_equals_oracle, make, solve

BATCH = 1024  # kMaxSamples of csrc/cuda/common/sample_parts.cuh: samples of one launch
LENGTHS = (33, 0, 1, 16, 7)


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("axis", AXES)
def test_every_axis_and_reference_count(emulate, axis, k):
    problems = [make((37, 70), LENGTHS, k, axis, unsigned) for unsigned in (True, False)]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize(("dtype", "ref_dtype"), list(itertools.product(DTYPES, REF_DTYPES)))
def test_every_dtype(emulate, dtype, ref_dtype):
    # K decides the size of a tile and how references are kept.
    cases = itertools.product(("tensor", "both"), (1, 2, 4))
    problems = [make((40, 24), (19, 3), k, a, True, dtype, ref_dtype) for a, k in cases]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", AXES)
def test_several_tiles_in_both_directions(emulate, axis, dtype):
    shapes = [(130, 65), (136, 264)]
    assert_equals_oracle(emulate, [make(s, (5, 40), 1, axis, dtype=dtype) for s in shapes])


def test_more_rows_of_tiles_than_a_band(emulate):
    # 17 and 18 rows of tiles of 64 rows; a band has 16.
    problems = [make((64 * 16 + 40, 130), (2,), 4, "row"), make((64 * 17 + 8, 8), (3,), 4)]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("axis", AXES)
def test_every_length_around_the_borders_of_a_stage(emulate, axis):
    lengths = (15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 128)
    problems = [make((8, 16), lengths, 1, axis, dtype=d) for d in (torch.float32, torch.float16)]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("axis", AXES)
def test_no_tokens_no_rows_no_columns_no_samples(emulate, axis):
    shapes = [(0, 5), (5, 0), (0, 0)]
    problems = [make(shape, (3, 0), 2, axis) for shape in shapes]
    problems += [make((9, 7), lengths, 2, axis) for lengths in ((), (0,), (0, 0, 0))]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("ref", [float("nan"), float("inf")])
def test_without_tokens_only_references_that_are_not_finite_show(emulate, axis, ref):
    problem = make((9, 7), (0, 2, 0), 1, axis)
    problem.refs[0][4, 5] = ref
    assert_equals_oracle(emulate, [problem])


def padded(data: torch.Tensor, lengths, longest: int, left: bool) -> tuple[torch.Tensor, list[int]]:
    """Samples as rows of a [B, T, C] tensor whose padding is NaN; packed view and starts."""
    batch = torch.full((len(lengths), longest, data.shape[1]), float("nan"), dtype=data.dtype)
    starts, row = [], 0
    for b, length in enumerate(lengths):
        first = longest - length if left else 0
        batch[b, first : first + length] = data[row : row + length]
        starts.append(b * longest + first)
        row += length
    return batch.reshape(-1, data.shape[1]), starts


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["tensor", "both"])
def test_padding_between_samples_is_never_read(emulate, axis, dtype, left):
    packed = make((24, 40), LENGTHS, 2, axis, dtype=dtype)
    x, starts = padded(packed.x, LENGTHS, 37, left)
    dy, _ = padded(packed.dy, LENGTHS, 37, left)
    whole = Problem(x, dy, starts, list(LENGTHS), packed.refs, axis)
    first, second = solve(emulate, [packed, whole])
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert_equals_oracle(emulate, [whole])


def view(rows: int, cols: int, dtype: torch.dtype, left: int, width: int) -> torch.Tensor:
    """A matrix inside a wider one that holds NaN everywhere else."""
    whole = torch.full((rows + 2, width), float("nan"), dtype=dtype)
    whole[1 : rows + 1, left : left + cols] = torch.randn(rows, cols).to(dtype)
    return whole[1 : rows + 1, left : left + cols]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["tensor", "both"])
def test_strides_and_alignments(emulate, axis, dtype):
    problems = []
    # (left, width): rows on 16-byte borders with ragged ends, or anywhere; each operand in turn.
    even, odd = (8, 96), (3, 91)
    for dy_at, x_at, ref_at in [(even, even, even), (odd, even, even), (even, odd, even),
                                (even, even, odd), (odd, odd, odd)]:  # fmt: skip
        dy, x = view(20, 35, dtype, *dy_at), view(20, 69, dtype, *x_at)
        refs = [view(35, 69, dtype, *ref_at) for _ in range(2)]
        problems.append(Problem(x, dy, [0, 8], [8, 12], refs, axis))
    problems[0].refs = [r.to(torch.float32) for r in problems[0].refs]
    assert_equals_oracle(emulate, problems)


def test_samples_in_any_order_and_shared_rows(emulate):
    problem = make((16, 24), (30,), 1, "both")
    problem.starts, problem.lengths = [20, 0, 5, 5], [10, 3, 17, 17]
    last = solve(emulate, [problem])[0]
    assert all(torch.equal(a, b) for a, b in zip(last[2], last[3], strict=True))
    assert_equals_oracle(emulate, [problem])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_reach_their_slices_and_no_others(emulate, bad, dtype):
    problems = []
    for operand, axis in itertools.product(("x", "dy"), ("tensor", "both")):
        problem = make((37, 45), (9, 20, 9), 1, axis, dtype=dtype)
        getattr(problem, operand)[15, 36] = bad
        problems.append(problem)
    assert_equals_oracle(emulate, problems)  # the oracle's infinities and NaN, exactly
    for problem, samples in zip(problems[1::2], solve(emulate, problems[1::2]), strict=True):
        rows, columns = (q[1:].isfinite().all(0) for q in samples[1])
        hit, other = (columns, rows) if problem is problems[1] else (rows, columns)
        assert hit.sum() == len(hit) - 1
        assert not hit[36]
        assert not other.any()
        for b in (0, 2):
            assert all(direction.isfinite().all() for direction in samples[b])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_references_reach_their_own_dots_only(emulate, bad):
    problem = make((37, 45), (9, 20), 3, "both")
    problem.refs[1][36, 44] = bad
    assert_equals_oracle(emulate, [problem])
    for rows, columns in solve(emulate, [problem])[0]:
        assert (~rows.isfinite()).nonzero().tolist() == [[4, 36]]
        assert (~columns.isfinite()).nonzero().tolist() == [[4, 44]]


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_in_the_batch_do_not_change_a_result(emulate, axis):
    lengths = (3, 50, 0, 18)
    together = make((40, 40), lengths, 2, axis)
    alone = [
        Problem(together.x, together.dy, [s], [n], together.refs, axis)
        for s, n in zip(together.starts, lengths, strict=True)
    ]
    first, *rest = solve(emulate, [together, *alone])
    for a, b in zip(first, rest, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b[0], strict=True))


def test_batches_longer_than_a_launch(emulate):
    """Several samples per block, and several launches; once is enough, it takes seconds."""
    lengths = [i % 3 for i in range(BATCH + 7)]
    problem = make((3, 5), lengths, 4, "both", ref_dtype=torch.float32)
    assert_equals_oracle(functools.partial(emulate, schedules=("random:2",)), [problem])


@pytest.mark.parametrize("axis", AXES)
def test_two_stages_give_the_results_of_three(emulate, axis):
    """Two where a block may take 99 KB: compute capability 8.6, 8.9 and 12.0."""
    problems = [make((136, 136), (0, 1, 17, 50, 64, 130), k, axis) for k in (0, 1, 2, 4)]
    problems.append(make((72, 72), LENGTHS, 2, axis, dtype=torch.float32))
    three, two = (
        solve(functools.partial(emulate, device={"SHARED_KB": kb}), problems) for kb in (227, 99)
    )
    for a, b in zip(itertools.chain(*three), itertools.chain(*two), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_error_is_no_larger_than_that_of_a_float32_product(emulate):
    problem = make((64, 128), (200,), 2, "tensor", dtype=torch.float32)
    (want,), _ = problem.expected(0)
    g = problem.dy.T @ problem.x
    plain_terms = [g, g * g, *(g.abs() * r for r in problem.refs)]
    plain = torch.stack([t.sum() for t in plain_terms]).double()
    floor = 2.0**-24 * torch.stack([t.abs().sum() for t in plain_terms]).double()
    got = solve(emulate, [problem])[0][0][0]
    error, allowed = ((a - want[1:, 0]).abs() for a in (got[1:, 0], plain))
    assert torch.all(error <= 2 * torch.maximum(allowed, floor))


def test_under_address_sanitizer(emulate_asan):
    cases = itertools.product(AXES, (0, 2, 4), DTYPES)
    problems = [make((35, 70), (18, 0, 3), k, a, dtype=d) for a, k, d in cases]
    assert_equals_oracle(emulate_asan, problems)

"""csrc/cuda/moments.cu on the emulated grid, against the float64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch

from gradsafe.ops import AXES

from .moments_cases import DTYPES, FIELDS, REF_DTYPES, Problem, assert_equals_oracle, make, solve

BATCH = 150  # kMaxEntries of csrc/cuda/moments.cu: matrices of one launch


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("k", range(5))
def test_every_axis_and_reference_count(emulate, k, axis):
    shapes = [(7, 33), (270, 140), (1, 5), (64, 64)]
    assert_equals_oracle(emulate, [make(shapes, k, axis, unsigned) for unsigned in (True, False)])


@pytest.mark.parametrize(("dtype", "ref_dtype"), list(itertools.product(DTYPES, REF_DTYPES)))
def test_every_dtype(emulate, dtype, ref_dtype):
    shapes = [(33, 290), (5, 16)]
    problems = [make(shapes, 2, axis, dtype=dtype, ref_dtype=ref_dtype) for axis in AXES]
    problems += [make([(19, 512), (3, 2048)], 2, a, dtype=dtype, ref_dtype=ref_dtype) for a in AXES]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vector_loops_of_every_reference_count(emulate, k, dtype):
    """Whole unrolled steps and what they leave over, flat and down the rows of an aligned view."""
    problems = []
    for axis in AXES:
        whole = make([(83, 512)], k, axis, dtype=dtype)
        wide = make([(21, 2304)], k, axis, dtype=dtype)
        view = Problem([wide.grads[0][:, 16:2080]], [[r[:, 16:2080] for r in wide.refs[0]]], axis)
        problems += [whole, view]
    assert_equals_oracle(emulate, problems)


def test_many_tiles(emulate):
    """Several tiles along both directions, broken (tile_matrix) and unbroken."""
    problems = []
    for axis in AXES:
        whole = make([(531, 261)], 1, axis, dtype=torch.bfloat16)
        part = Problem([whole.grads[0][:, 1:]], [[whole.refs[0][0][:, 1:]]], axis)
        problems += [whole, part]
    problems.append(make([(130, 1100)], 1, "tensor"))
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("axis", AXES)
def test_odd_and_empty_shapes(emulate, axis):
    sizes = [0, 1, 2, 7, 8, 9, 31, 63, 65, 129, 257]
    shapes = [*itertools.product(sizes, [0, 1, 7, 33, 130]), (3, 257), (2, 1025)]
    problems = [make(shapes, 1, axis, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    problems += [make([(0, 5)], 2, axis), make([(5, 0)], 0, axis), make([], 0, axis)]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("axis", AXES)
def test_lists_longer_than_a_launch(emulate, axis):
    shapes = [(i % 3 + 1, i % 7) for i in range(2 * BATCH + 1)]
    assert_equals_oracle(emulate, [make(shapes, 1, axis)])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_with_row_stride_and_odd_alignment(emulate, dtype, axis):
    big, big_ref = torch.randn(50, 203).to(dtype), torch.randn(49, 300).to(dtype)
    grad, ref = big[1:48, 3:190], big_ref[2:49, 101:288]
    shifted = torch.randn(47 * 187 + 1).to(dtype)[1:].view(47, 187)
    problems = [Problem([g], [[ref]], axis) for g in (grad, shifted)]
    aligned = torch.randn(20, 64).to(dtype)[:, :40]  # rows on 16-byte borders, ends inside a load
    problems.append(Problem([aligned], [[aligned]], axis))
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("axis", AXES)
def test_memory_between_the_rows_of_a_view_is_never_read(emulate, axis):
    poisoned = torch.full((40, 120), float("nan"))
    poisoned[2:37, 5:112] = torch.randn(35, 107)
    view = poisoned[2:37, 5:112]
    assert_equals_oracle(emulate, [Problem([view], [[view]], axis)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_reach_their_slices_and_no_others(emulate, bad):
    problem = make([(40, 50), (4, 4)], 1, "both")
    problem.grads[0][7, 9] = bad
    rows, columns = solve(emulate, [problem])[0]
    for result, index in ((rows, 7), (columns, 9)):
        for name in FIELDS:
            values = getattr(result, name)[0].reshape(-1, len(result.count[0]))
            finite = torch.isfinite(values).all(0)
            assert not finite[index]
            assert finite.sum() == len(finite) - 1
            assert torch.isfinite(getattr(result, name)[1]).all()


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_in_the_list_do_not_change_a_result(emulate, axis):
    together = make([(20, 300), (70, 70), (5, 9)], 2, axis)
    alone = Problem(together.grads[1:2], together.refs[1:2], axis)
    first, second = solve(emulate, [together, alone])
    for a, b in zip(first, second, strict=True):
        for name in ("count", *FIELDS):
            assert torch.equal(getattr(a, name)[1], getattr(b, name)[0])


def test_under_address_sanitizer(emulate_asan):
    shapes = [(7, 33), (270, 140), (0, 3), (1, 5)]
    problems = [make(shapes, k, axis) for axis, k in itertools.product(AXES, (0, 4))]
    big = torch.randn(50, 203).bfloat16()
    problems += [Problem([big[1:48, 3:190]], [[big[2:49, 5:192]]], axis) for axis in AXES]
    assert_equals_oracle(emulate_asan, problems)

"""csrc/cuda/kl_divergence.cu on the emulated grid, against the float64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch

from .kl_divergence_cases import DTYPES, Problem, assert_equals_oracle, make, solve

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(("dtype", "teacher_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_every_dtype(emulate, dtype, teacher_dtype):
    shapes = [(5, 1), (3, 17), (6, 1031), (2, 4096)]
    problems = [make(shape, dtype, teacher_dtype) for shape in shapes]
    problems.append(make((3, 130), dtype, teacher_dtype, gradient=False))
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_steps_of_a_block(emulate, dtype):
    assert_equals_oracle(emulate, [make((2, 9001), dtype), make((5, 9008), dtype)])


@pytest.mark.parametrize(("dtype", "teacher_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_aligned_rows_of_every_dtype(emulate, dtype, teacher_dtype):
    """Rows on 16-byte borders that fill one chunk or a few, with and without a ragged end."""
    shapes = [(5, 16), (6, 1032), (5, 8192), (3, 12296)]
    problems = [make(shape, dtype, teacher_dtype) for shape in shapes]
    problems.append(make((5, 4104), dtype, teacher_dtype, gradient=False))
    assert_equals_oracle(emulate, problems)


def test_rows_longer_than_the_ring(emulate):
    """Of 14 chunks of 4,096 columns it keeps 12; the others are loaded again for the gradient."""
    assert_equals_oracle(emulate, [make((3, 14 * 4096 + 8), torch.bfloat16)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_and_empty_shapes(emulate, dtype):
    sizes = [1, 2, 7, 8, 9, 31, 33, 127, 2047, 2049]
    problems = [make((2, size), dtype) for size in sizes] + [make((0, 5), dtype)]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_with_row_stride_and_odd_alignment(emulate, dtype):
    big = torch.full((13, 203), NAN).to(dtype)
    student, teacher, weight = (
        getattr(make((4, 187), dtype), name) for name in ("student", "teacher", "weight")
    )
    big[1:5, 3:190] = student
    wide = torch.full((4, 256), NAN).to(dtype)  # rows on 16-byte borders, ends inside a load
    wide[:, :187] = student
    views = [student, big[1:5, 3:190], wide[:, :187]]
    problems = [Problem(view, teacher, weight) for view in views]
    wide_teacher = torch.full((4, 192), NAN).to(dtype)  # both sides: the path of aligned rows
    wide_teacher[:, :187] = teacher
    problems.append(Problem(wide[:, :187], wide_teacher[:, :187], weight))
    assert_equals_oracle(emulate, problems)
    results = solve(emulate, problems)
    for value, gradient in results[1:]:  # neither alignment nor stride changes a bit
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_equal_rows_give_exactly_zero(emulate):
    problems = []
    for dtype in DTYPES:
        student = make((4, 2061), dtype).student
        student[1, 3] = -INF
        problems.append(Problem(student, student.clone(), torch.ones(4)))
    for value, gradient in solve(emulate, problems):
        assert not value.any()
        assert not gradient.any()


def test_masked_vocabularies_and_vanishing_columns(emulate):
    masked = make((4, 5000))
    masked.teacher[:, 2500:] = -INF
    masked.teacher[3, :2400] = -INF
    masked.student[2, 2600:] = -INF
    hidden = make((3, 5000))
    hidden.student[:, 4990] = hidden.teacher[:, 4990] = 600
    assert_equals_oracle(emulate, [masked, hidden])
    hidden.weight[:] = 1
    hidden.student[1, 0] = NAN
    hidden.student[2, 0] = -INF
    value, gradient = solve(emulate, [hidden])[0]
    assert torch.isfinite(value).tolist() == [True, False, True]
    assert torch.isfinite(gradient).all(1).tolist() == [True, False, True]
    masked.student[0, 7] = -INF
    value, gradient = solve(emulate, [masked])[0]
    assert value[0] == INF
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_non_finite_logits_reach_their_row_and_no_other(emulate, bad):
    problems = []
    for side, column in itertools.product(("student", "teacher"), (0, 2500)):
        problem = make((4, 2600))
        getattr(problem, side)[2, column] = bad
        problems.append(problem)
    for value, gradient in solve(emulate, problems):
        assert torch.isnan(value).tolist() == [False, False, True, False]
        assert torch.isnan(gradient).all(1).tolist() == [False, False, True, False]
        assert torch.isnan(gradient).any(1).sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_zero_writes_zeros_and_reports_the_value(emulate, dtype):
    problem = make((3, 1001), dtype)
    problem.student[1, 3] = NAN
    problem.weight[:] = 0
    value, gradient = solve(emulate, [problem])[0]
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.isnan(value).tolist() == [False, True, False]
    assert value[0] > 0


def test_under_address_sanitizer(emulate_asan):
    problems = [make((3, 2100), dtype) for dtype in DTYPES]
    big = torch.randn(12, 203).bfloat16()
    problems.append(Problem(big[1:11, 3:190], torch.randn(10, 187), torch.ones(10)))
    assert_equals_oracle(emulate_asan, problems)

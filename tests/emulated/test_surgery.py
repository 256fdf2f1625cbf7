"""csrc/cuda/surgery.cu on the emulated grid, against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

from .surgery_cases import (
    DTYPES,
    TILE,
    Problem,
    assert_equals_oracle,
    assert_sums,
    make,
    solve,
    tensor_of,
)

BATCH = 800  # kMaxEntries of csrc/cuda/surgery.cu: tensors of one launch


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_gate(emulate, dtype):
    sizes = [7, 300, TILE, 0, 2100]
    problems = [make(sizes, dtype, rho, None, c) for rho in (0.0, 0.5) for c in (True, False)]
    assert_equals_oracle(emulate, problems)


def test_mixed_dtypes_and_many_tiles(emulate):
    problem = make([2 * TILE + 5, TILE - 1, TILE, 1, 3000])
    dtypes = [DTYPES[i % 3] for i in range(5)]
    user = [u.to(d) for u, d in zip(problem.user, dtypes, strict=True)]
    align = [a.to(d) for a, d in zip(problem.align, dtypes, strict=True)]
    assert_equals_oracle(emulate, [Problem(user, align)])


def test_odd_and_empty_sizes(emulate):
    sizes = [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 63, 65, 255, 257, 1023, 1025]
    problems = [make([n], dtype) for n in sizes for dtype in DTYPES]
    problems += [make([]), make([0, 0]), make(sizes), Problem([], [], groups=[])]
    assert_equals_oracle(emulate, problems)


def test_groups(emulate):
    problem = make([400, TILE + 3, 5, 0, 77, 900], groups=[1, 0, 2, 3, 0, 1])
    problem.align[0] = -problem.align[0]
    assert_equals_oracle(emulate, [problem])
    ((users, results),) = solve(emulate, [problem])
    assert results[3].tolist() == [0.0, 0.0, 0.0, 1.0]  # a group without elements
    alone = Problem([problem.user[i] for i in (1, 4)], [problem.align[i] for i in (1, 4)])
    ((lone_users, lone_results),) = solve(emulate, [alone])
    assert torch.equal(lone_results[0], results[0])
    assert torch.equal(lone_users[0], users[1])
    assert torch.equal(lone_users[1], users[4])


def test_lists_longer_than_a_launch(emulate):
    """Groups for more than one launch: test_planted_surgery_bugs.py, where one takes two."""
    sizes = [i % 5 for i in range(BATCH + 1)]
    assert_equals_oracle(emulate, [make(sizes, groups=[i % 3 for i in range(len(sizes))])])


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_alignment_of_either_side(emulate, dtype):
    user, align = torch.randn(TILE + 60).to(dtype), torch.randn(TILE + 60).to(dtype)
    views = [(user[1:-9], align[1:-9]), (user[8:-2], align[1:-9]), (user[3:43], align[8:48])]
    assert_equals_oracle(emulate, [Problem([u], [a]) for u, a in views])


def test_sums_alone_and_merge_with_given_sums(emulate):
    problem = make([500, TILE + 1], groups=[0, 1])
    (output,) = emulate([problem.case("surgery_sums")])
    sums = tensor_of(output[0], torch.float64).view(2, 3)
    assert_sums(problem, sums)
    (whole,) = emulate([problem.case()])
    (merged,) = emulate([problem.case("surgery_merge", sums)])
    assert merged == whole


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_non_finite_values_leave_their_group_untouched(emulate, bad):
    problem = make([300, 40, 50], groups=[0, 1, 0])
    problem.align[2][7] = bad
    ((users, results),) = solve(emulate, [problem])
    assert results[:, 3].isnan().tolist() == [True, False]
    assert torch.equal(users[0], problem.user[0])
    assert torch.equal(users[2], problem.user[2])
    assert not torch.equal(users[1], problem.user[1])


def test_under_address_sanitizer(emulate_asan):
    problems = [make([7, TILE + 300, 0, 65], dtype, groups=[0, 1, 0, 1]) for dtype in DTYPES]
    view = torch.randn(700).bfloat16()
    problems.append(Problem([view[3:650]], [view[1:648]]))
    assert_equals_oracle(emulate_asan, problems)

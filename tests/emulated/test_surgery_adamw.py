"""csrc/cuda/surgery_adamw.cu on the emulated grid, against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

from .surgery_cases import DTYPES, TILE, assert_adamw_equals_oracle, make_adamw

BATCH = 400  # kMaxEntries of csrc/cuda/surgery_adamw.cu: parameters of one launch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_counter", [False, True])
def test_every_dtype(emulate, one_counter, dtype):
    sizes = [7, 300, TILE, 0, 2100]
    problems = [make_adamw(sizes, dtype, groups, one_counter) for groups in (None, [1, 0, 0, 2, 1])]
    assert_adamw_equals_oracle(emulate, problems)


def test_odd_and_empty_sizes(emulate):
    sizes = [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 65, 257, 1025]
    problems = [make_adamw([n], dtype) for n in sizes for dtype in DTYPES]
    assert_adamw_equals_oracle(emulate, [*problems, make_adamw(sizes), make_adamw([0, 0])])


def test_lists_longer_than_a_launch(emulate):
    """Counters for more than one launch: test_planted_surgery_bugs.py, where one takes two."""
    problem = make_adamw([i % 3 for i in range(BATCH + 1)], one_counter=True)
    assert_adamw_equals_oracle(emulate, [problem])


@pytest.mark.parametrize("shifted", range(5))
def test_odd_alignment_of_each_buffer(emulate, shifted):
    problem = make_adamw([TILE], torch.bfloat16)
    pairs = problem.pairs
    lists = [pairs.user, pairs.align, problem.params, problem.exp_avg, problem.exp_avg_sq]
    lists[shifted][0] = torch.cat([torch.zeros(1).bfloat16(), lists[shifted][0]])[1:]
    assert_adamw_equals_oracle(emulate, [problem])


@pytest.mark.parametrize("row", [0, 2])
def test_one_bad_group_stops_every_update_and_counter(emulate, row):
    problem = make_adamw([300, 40, TILE], groups=[0, 1, 2])
    problem.sums[row, 1] = math.nan
    (output,) = emulate([problem.case()])
    states, results = problem.parse(output)
    assert results[:, 3].isnan().all()
    assert torch.equal(results[:, :3].nan_to_num(), problem.sums.nan_to_num())
    lists = zip(problem.params, problem.exp_avg, problem.exp_avg_sq, strict=True)
    before = [*(s.reshape(1) for s in problem.steps), *(t for task in lists for t in task)]
    assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))


def test_under_address_sanitizer(emulate_asan):
    problems = [make_adamw([7, TILE + 30, 0, 65], d, [0, 1, 0, 1]) for d in DTYPES]
    assert_adamw_equals_oracle(emulate_asan, problems)

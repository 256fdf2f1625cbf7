"""Experts in csrc/cuda/wgrad_moments.cu on the emulated grid, against the float64 oracle."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from gradsafe.ops import AXES

from .wgrad_moments_cases import DTYPES, REF_DTYPES, Problem, assert_equals_oracle, make, solve

BATCH = 1024  # kMaxSamples of csrc/cuda/common/sample_parts.cuh: samples of one launch
LENGTHS = (3, 0, 33, 1, 5, 2, 16, 4)
EXPERTS = (4, 0, 0, 2, 4, 4, 0, 1)  # not sorted; nothing reaches 3


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("axis", AXES)
def test_every_axis_and_reference_count(emulate, axis, k):
    problems = [make((37, 70), LENGTHS, k, axis, u, experts=EXPERTS) for u in (True, False)]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("ref_dtype", REF_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(emulate, dtype, ref_dtype):
    # 24 columns: matrices of experts start on 16-byte borders; 25: most do not.
    cases = itertools.product(("tensor", "both"), (24, 25))
    problems = [
        make((40, ins), (9, 3, 4), 2, axis, True, dtype, ref_dtype, (2, 0, 2))
        for axis, ins in cases
    ]
    assert_equals_oracle(emulate, problems)


@pytest.mark.parametrize("axis", AXES)
def test_several_tiles_in_both_directions(emulate, axis):
    assert_equals_oracle(emulate, [make((136, 264), (5, 40, 2), 1, axis, experts=(1, 0, 1))])


@pytest.mark.parametrize("axis", AXES)
def test_a_segment_equals_a_call_of_its_own(emulate, axis):
    together = make((40, 40), LENGTHS, 2, axis, experts=EXPERTS)
    alone = [
        Problem(together.x, together.dy, [s], [n], [r[e] for r in together.refs], axis)
        for s, n, e in zip(together.starts, LENGTHS, EXPERTS, strict=True)
    ]
    first, *rest = solve(emulate, [together, *alone])
    for a, b in zip(first, rest, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b[0], strict=True))


@pytest.mark.parametrize("axis", ["tensor", "both"])
def test_experts_without_a_segment_are_never_read(emulate, axis):
    problem = make((24, 40), LENGTHS, 2, axis, experts=EXPERTS)
    for ref in problem.refs:
        ref[[3, 5]] = float("nan")
    assert_equals_oracle(emulate, [problem])
    assert all(d.isfinite().all() for sample in solve(emulate, [problem])[0] for d in sample)


def test_strides_between_experts(emulate):
    problem = make((24, 40), LENGTHS, 2, "both", experts=EXPERTS)
    for stride in (1000, 1001):  # on and off 16-byte borders
        wide = [torch.full((6, stride), float("nan")).bfloat16() for _ in problem.refs]
        views = [w[:, :960].unflatten(1, (24, 40)) for w in wide]
        for view, ref in zip(views, problem.refs, strict=True):
            view.copy_(ref)
        problem.refs = views
        assert_equals_oracle(emulate, [problem])


def test_no_segments_and_no_experts(emulate):
    problem = make((9, 7), (), 2, "both", experts=())
    problem.refs = [ref[:0] for ref in problem.refs]
    assert_equals_oracle(emulate, [problem])


def test_lists_longer_than_a_launch(emulate):
    lengths = [i % 3 for i in range(BATCH + 7)]
    problem = make((3, 5), lengths, 1, "both", experts=[i * 7 % 11 for i in range(BATCH + 7)])
    assert_equals_oracle(functools.partial(emulate, schedules=("random:2",)), [problem])


def test_under_address_sanitizer(emulate_asan):
    cases = itertools.product(AXES, (0, 2), DTYPES)
    problems = [make((35, 70), (4, 0, 3), k, a, dtype=d, experts=(1, 0, 1)) for a, k, d in cases]
    assert_equals_oracle(emulate_asan, problems)

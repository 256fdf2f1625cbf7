"""csrc/cuda/wgrad_moments_sm90.cu on the emulated grid, against the float64 oracle."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from .emulator import Runner, kernels
from .wgrad_moments_cases import Problem, assert_equals_oracle, make, solve

HOPPER = {"CAPABILITY": 90, "SMS": 2}
LENGTHS = (17, 0, 70, 1, 64, 50, 130)
F8 = torch.float8_e4m3fn


def on(emulate: Runner, **device: int) -> Runner:
    return functools.partial(emulate, device=HOPPER | device)


def assert_same(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("axis", ["tensor", "row"])
def test_every_axis_and_reference_count(emulate, axis, k):
    problems = [make((200, 328), LENGTHS, k, axis), make((72, 136), (33, 5), k, axis, False)]
    assert_equals_oracle(on(emulate), problems)


@pytest.mark.parametrize("ref_dtype", [torch.bfloat16, torch.float16, torch.float32, F8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype(emulate, dtype, ref_dtype):
    cases = itertools.product(("tensor", "row"), (1, 2))
    problems = [make((136, 144), (19, 3), k, a, True, dtype, ref_dtype) for a, k in cases]
    assert_equals_oracle(on(emulate), problems)


@pytest.mark.parametrize("axis", ["tensor", "row"])
def test_what_lies_behind_a_sample_does_not_matter(emulate, axis):
    packed = make((136, 72), LENGTHS, 1, axis)
    x, dy = (
        torch.full((7 * 140, t.shape[1]), float("nan")).bfloat16() for t in (packed.x, packed.dy)
    )
    starts = [140 * b for b in range(7)]
    for start, own, length in zip(starts, packed.starts, LENGTHS, strict=True):
        x[start : start + length] = packed.x[own : own + length]
        dy[start : start + length] = packed.dy[own : own + length]
    whole = Problem(x, dy, starts, list(LENGTHS), packed.refs, axis)
    assert_same(*solve(on(emulate), [packed, whole]))
    assert_equals_oracle(on(emulate), [whole])


@pytest.mark.parametrize("experts", [None, [1, 0, 1, 3, 0, 1, 1]])
def test_the_number_of_blocks_does_not_change_a_result(emulate, experts):
    problem = make((200, 264), LENGTHS, 2, experts=experts)
    first = solve(on(emulate, SMS=1), [problem])[0]
    for sms in (5, 132):
        assert_same(first, solve(on(emulate, SMS=sms), [problem])[0])
    assert_equals_oracle(on(emulate, SMS=1), [problem])


@pytest.mark.parametrize("axis", ["tensor", "row"])
def test_experts(emulate, axis):
    problem = make((136, 72), LENGTHS, 2, axis, experts=(4, 0, 0, 2, 4, 4, 0))
    for ref in problem.refs:
        ref[[1, 3, 5]] = float("nan")  # no segment of theirs
    assert_equals_oracle(on(emulate), [problem])


def test_experts_whose_references_lie_apart(emulate):
    problem = make((72, 64), (20, 3), 1, experts=(1, 0))
    wide = torch.full((3, 72 * 64 + 8), float("nan")).bfloat16()
    view = wide[:, :-8].unflatten(1, (72, 64))
    view.copy_(problem.refs[0])
    problem.refs = [view]
    assert_equals_oracle(on(emulate), [problem])


def test_more_rows_of_tiles_than_a_band(emulate):
    # 17 rows of tiles of 128 rows; a band has 16.
    assert_equals_oracle(on(emulate, SMS=5), [make((128 * 16 + 8, 136), (2,), 1, "row")])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_reach_their_slices_and_no_others(emulate, bad):
    problems = []
    for operand in ("x", "dy"):
        problem = make((72, 88), (9, 20, 9), 1, "row")
        getattr(problem, operand)[15, 36] = bad
        problems.append(problem)
    problem = make((72, 88), (9, 20), 2, "row")
    problem.refs[1][36, 84] = bad
    assert_equals_oracle(on(emulate), [*problems, problem])


@pytest.mark.parametrize("axis", ["tensor", "row"])
def test_neighbours_in_the_batch_do_not_change_a_result(emulate, axis):
    together = make((72, 136), LENGTHS, 1, axis)
    alone = [
        Problem(together.x, together.dy, [s], [n], together.refs, axis)
        for s, n in zip(together.starts, LENGTHS, strict=True)
    ]
    first, *rest = solve(on(emulate), [together, *alone])
    assert_same(first, [r[0] for r in rest])


TAKEN = make((64, 64), (3,), 1)
NOT_TAKEN = {
    "columns": make((64, 64), (3,), 1, "both"),
    "float32": make((64, 64), (3,), 1, dtype=torch.float32),
    "three references": make((64, 64), (3,), 3),
    "few rows": make((56, 64), (3,), 1),
    "few columns": make((64, 56), (3,), 1),
    "rows of dy off 16-byte borders": make((65, 64), (3,), 1),
    "rows of x off 16-byte borders": make((64, 65), (3,), 1),
    "references of the other 16-bit type": make((64, 64), (3,), 1, ref_dtype=torch.float16),
    "no samples": make((64, 64), (), 1),
}


def launched(emulate: Runner, problem: Problem, **device: int) -> str:
    return " ".join(kernels(emulate.args[0], [problem.case()], HOPPER | device))


def test_the_form_runs_on_compute_capability_9_0(emulate):
    assert "wgrad_moments_wgmma" in launched(emulate, TAKEN)
    for device in ({"CAPABILITY": 80}, {"CAPABILITY": 100}, {"SHARED_KB": 226}):
        assert "wgrad_moments_tile" in launched(emulate, TAKEN, **device)


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_other_problems_take_the_general_form(emulate, name):
    assert "wgmma" not in launched(emulate, NOT_TAKEN[name])
    assert_equals_oracle(on(emulate), [NOT_TAKEN[name]])


def test_under_address_sanitizer(emulate_asan):
    problems = [
        make((136, 72), (18, 0, 3, 70), k, a)
        for a, k in itertools.product(("tensor", "row"), (0, 2))
    ]
    assert_equals_oracle(on(emulate_asan), problems)

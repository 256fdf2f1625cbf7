"""`kl_divergence_` on a real GPU: streams and graphs. Oracle tests: tests/ops, marked gpu."""

from __future__ import annotations

import itertools

import pytest
import torch

from gradsafe.ops import _default as reference
from gradsafe.ops import kl_divergence, kl_divergence_

pytestmark = pytest.mark.gpu


def make(shape=(65, 32_003), dtype=torch.bfloat16):
    student = torch.randn(shape) * 3
    teacher = student + torch.randn(shape)
    return student.to(dtype).cuda(), teacher.to(dtype).cuda(), torch.rand(shape[0]).cuda()


def solve(student, teacher, weight):
    buffer = student.clone()
    return kl_divergence_(buffer, teacher, weight), buffer


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Rows of a multiple of 16 bytes, with and without a rest behind the packs of a block, or of none.
@pytest.mark.parametrize("vocabulary", [32_768, 10_008, 10_003, 24])
@pytest.mark.parametrize(("dtype", "teacher_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_equals_the_oracle_and_repeats(dtype, teacher_dtype, vocabulary, paths):
    student, teacher, weight = make((33, vocabulary), dtype)
    arguments = student, teacher.to(teacher_dtype), weight
    with paths:
        value, gradient = solve(*arguments)
    exact = student.double()
    probabilities = exact.softmax(1) + arguments[1].double().softmax(1)
    wanted = reference.kl_divergence_(exact, arguments[1], weight)
    assert torch.all((value - wanted).abs() <= 1e-5 * (1 + wanted))
    limits = torch.finfo(dtype)
    bound = 1e-5 * weight[:, None] * probabilities + limits.eps * exact.abs()
    assert torch.all((gradient - exact).abs() <= bound + limits.smallest_normal * limits.eps)
    for _ in range(3):
        again = solve(*arguments)
        assert torch.equal(again[0], value)
        assert torch.equal(again[1], gradient)


@pytest.mark.parametrize("aligned", [True, False])
def test_student_and_teacher_may_differ_in_alignment(aligned, paths):
    student, teacher, _ = make((9, 4096))
    wide = torch.empty(9, 4097, dtype=teacher.dtype, device="cuda")[:, :4096]
    wide.copy_(teacher)
    moved = (student, wide) if aligned else (wide, student)
    plain = (student, teacher) if aligned else (teacher, student)
    with paths:
        value = kl_divergence(*moved)
    assert torch.equal(value, kl_divergence(*plain))


def test_more_rows_than_blocks():
    student, teacher, weight = make((40_001, 50))
    value, gradient = solve(student, teacher, weight)
    alone = solve(student[-1:], teacher[-1:], weight[-1:])
    assert torch.equal(alone[0], value[-1:])
    assert torch.equal(alone[1], gradient[-1:])


def test_runs_on_the_current_stream():
    """The input is written late on a side stream; a kernel elsewhere would read the old values."""
    student, teacher, weight = make()
    expected = solve(student, teacher, weight)
    late = torch.zeros_like(student)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(student)
        value = kl_divergence_(late, teacher, weight)
    stream.synchronize()
    assert torch.equal(value, expected[0])
    assert torch.equal(late, expected[1])


def test_capture_and_replay_with_changed_inputs():
    student, teacher, weight = make()
    buffer = student.clone()
    for _ in range(2):
        kl_divergence(student, teacher)
        kl_divergence_(student.clone(), teacher, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffer.copy_(student)
        value = kl_divergence_(buffer, teacher, weight)
    for factor in (1.0, -0.5):
        student.mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        fresh = solve(student, teacher, weight)
        assert torch.equal(value, fresh[0])
        assert torch.equal(buffer, fresh[1])

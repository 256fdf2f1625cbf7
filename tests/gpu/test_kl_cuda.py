"""`kl_divergence_` on a real GPU: streams and graphs. Oracle tests: tests/ops, marked gpu."""

from __future__ import annotations

import pytest
import torch

from gradsafe import reference
from gradsafe.ops import kl_divergence, kl_divergence_

pytestmark = pytest.mark.gpu


def make(shape=(65, 32_003), dtype=torch.bfloat16):
    student = torch.randn(shape) * 3
    teacher = student + torch.randn(shape)
    return student.to(dtype).cuda(), teacher.to(dtype).cuda(), torch.rand(shape[0]).cuda()


def solve(student, teacher, weight):
    buffer = student.clone()
    return kl_divergence_(buffer, teacher, weight), buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_oracle_and_repeats(dtype):
    arguments = make(dtype=dtype)
    value, gradient = solve(*arguments)
    exact = arguments[0].cpu().double()
    wanted = reference.kl_divergence_(exact, arguments[1].cpu(), arguments[2].cpu())
    assert torch.allclose(value.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradient.cpu().double(), exact, rtol=1e-2, atol=1e-6)
    for _ in range(5):
        again = solve(*arguments)
        assert torch.equal(again[0], value)
        assert torch.equal(again[1], gradient)


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

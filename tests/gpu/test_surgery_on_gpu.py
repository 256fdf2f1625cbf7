"""Gradient surgery on a real GPU: oracle, determinism, streams, graphs with gate flips."""

from __future__ import annotations

import pytest
import torch

from gradsafe.ops import _default as reference
from gradsafe.ops import (
    subspace_surgery_,
    surgery_,
    surgery_adamw_,
    surgery_merge_,
    surgery_sums,
)

pytestmark = pytest.mark.gpu
SHAPES = [(513, 2049), (64, 128), (7, 5), (1, 70_000), (0, 3), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(tensor, shift=1):
    """The same values behind a 16-byte border: no load of 16 bytes is possible."""
    buffer = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=tensor.device)
    return buffer[shift:].view(tensor.shape).copy_(tensor)


def make(dtype=torch.bfloat16, device="cuda", aligned=True):
    user = [torch.randn(shape) for shape in SHAPES]
    align = [torch.randn_like(u) - 2 * u for u in user]
    lists = [u.to(device, dtype) for u in user], [a.to(device, dtype) for a in align]
    return lists if aligned else tuple([moved(t) for t in tensors] for tensors in lists)


def states(user):
    params = [torch.randn_like(u) for u in user]
    second = [torch.rand_like(u) + 0.1 for u in user]
    return params, [torch.zeros_like(u) for u in user], second, torch.ones((), device="cuda")


def copies(tensors):
    return [t.clone() for t in tensors]


def assert_near(got, want, dtype):
    """16-bit values may round the other way, on the last bit of a float32 result."""
    for a, b in zip(got, want, strict=True):
        bound = torch.finfo(dtype).eps * b.double().abs() + 4e-6
        assert torch.all((a.cpu().double() - b.cpu().double()).abs() <= bound.cpu())


@pytest.mark.parametrize("groups", [None, [1, 0, 2, 1, 0, 2]])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle_and_the_cpu(dtype, groups, aligned, paths):
    user, align = make(dtype, aligned=aligned)
    on_cpu, oracle = [u.cpu() for u in user], copies(user)
    want = reference.surgery_(oracle, align, 0.5, groups)
    cpu = surgery_(on_cpu, [a.cpu() for a in align], 0.5, groups)
    with paths:
        got = surgery_(user, align, 0.5, groups)
    assert torch.allclose(got, want, rtol=1e-5)
    assert torch.allclose(got.cpu(), cpu, rtol=1e-5)
    assert_near(user, oracle, dtype)
    assert_near(user, on_cpu, dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_equals_the_oracle(dtype, aligned, paths):
    user, align = make(dtype, aligned=aligned)
    params, first, second, step = states(user)
    if not aligned:
        params, first, second = ([moved(t) for t in tensors] for tensors in (params, first, second))
    expected = [copies(t) for t in (params, first, second)]
    counter = step.clone()
    reference.surgery_adamw_(expected[0], user, align, *expected[1:], counter, lr=0.1)
    with paths:
        surgery_adamw_(params, user, align, first, second, step, lr=0.1)
    for got, want in zip((params, first, second), expected, strict=True):
        assert_near(got, want, dtype)
    assert step == counter == 2


def test_repeats_are_bitwise_equal():
    user, align = make()
    first = copies(user)
    result = surgery_(first, align)
    for _ in range(5):
        again = copies(user)
        assert torch.equal(surgery_(again, align), result)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_halves_on_a_side_stream():
    """The gradients are written late on a side stream; a kernel elsewhere would read old values."""
    user, align = make()
    expected = copies(user)
    result = surgery_(expected, align)
    late = [torch.zeros_like(u) for u in user]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for target, u in zip(late, user, strict=True):
            target.copy_(u)
        got = surgery_merge_(late, align, surgery_sums(late, align))
    stream.synchronize()
    assert torch.equal(got, result)
    assert all(torch.equal(a, b) for a, b in zip(late, expected, strict=True))


def test_a_captured_graph_follows_the_gate():
    user, align = make()
    params, first, second, step = states(user)
    inputs = copies(user)
    graph = torch.cuda.CUDAGraph()
    surgery_adamw_(params, user, align, first, second, step)
    surgery_(copies(user), align)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        stepped = surgery_adamw_(params, user, align, first, second, step)
        merged = surgery_(user, align)
    for sign in (1.0, -1.0, float("nan"), 1.0):
        for target, u in zip(user, inputs, strict=True):
            target.copy_(sign * u)
        want_user, want = copies(user), [copies(t) for t in (params, first, second, [step])]
        expected_step = surgery_adamw_(want[0], want_user, align, *want[1:3], want[3][0])
        expected = surgery_(want_user, align)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(stepped.nan_to_num(), expected_step.nan_to_num())
        assert torch.equal(merged.nan_to_num(), expected.nan_to_num())
        assert merged[3].isnan() == (sign != sign)
        for got, wanted in zip(
            (params, first, second, [step], user), (*want, want_user), strict=True
        ):
            for a, b in zip(got, wanted, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_more_than_2_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    count = 2**31 + 100
    if free < 3 * count * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    user = [torch.ones(count, dtype=torch.bfloat16, device="cuda")]
    align = [torch.full_like(user[0], -1.0)]
    result = surgery_(user, align)
    assert result.tolist() == [-count, count, count, 2.0]
    assert user[0][-1] == -1
    assert user[0].min() == user[0].max()


def test_a_wrong_device_is_named():
    with pytest.raises(ValueError, match=r"align\[0\] on cuda:0"):
        surgery_([torch.ones(3, device="cuda")], [torch.ones(3)])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("rank", [1, 8, 10])
@pytest.mark.parametrize("dtype", DTYPES)
def test_subspace_equals_the_oracle_and_the_cpu(dtype, rank, aligned, paths):
    shapes = [(512, 128), (513, 2049), (7, 5), ()]
    user = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    scale = sum(u.numel() for u in user) ** -0.5  # as of orthonormal vectors
    basis = [(scale * torch.randn(rank, *u.shape, device="cuda")).to(dtype) for u in user]
    if not aligned:
        user, basis = ([moved(t) for t in tensors] for tensors in (user, basis))
    zero = torch.zeros(rank, dtype=torch.float64, device="cuda")
    direction = -reference.subspace_surgery_(copies(user), basis, zero)[2 : 2 + rank]
    on_cpu, oracle = [u.cpu() for u in user], copies(user)
    want = reference.subspace_surgery_(oracle, basis, direction, 0.5)
    cpu = subspace_surgery_(on_cpu, [b.cpu() for b in basis], direction.cpu(), 0.5)
    with paths:
        got = subspace_surgery_(user, basis, direction, 0.5)
    assert got[0] < 0
    near = {"rtol": 1e-5, "atol": 1e-5 * float(want[1]) ** 0.5}
    assert torch.allclose(got, want, **near)
    assert torch.allclose(got.cpu(), cpu, **near)
    assert_near(user, oracle, dtype)
    assert_near(user, on_cpu, dtype)

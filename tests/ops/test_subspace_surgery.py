from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsafe._backend import _C
from gradsafe.ops import _default as reference
from gradsafe.ops import subspace_surgery_, surgery_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(7, 33), (300, 513), (), (1, 5), (40_000,), (2, 3, 4), (0, 3)]
Call = tuple[list[Tensor], list[Tensor], Tensor]


def make(shapes=SHAPES, dtype=torch.float32, rank=3, conflict=True, device="cpu") -> Call:
    """Gradients, orthonormal vectors over all of them, and a direction that u opposes or not."""
    sizes = [math.prod(shape) for shape in shapes]
    rank = min(rank, sum(sizes))
    u = torch.randn(sum(sizes), dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(sum(sizes), rank, dtype=torch.float64))[0].T
    dots = vectors @ u
    direction = (-dots if conflict else dots) + 0.1 * torch.randn(rank, dtype=torch.float64)
    if (float(direction @ dots) < 0) != conflict:
        direction = -direction
    users = [p.reshape(s).to(device, dtype) for p, s in zip(u.split(sizes), shapes, strict=True)]
    basis = [
        p.reshape(rank, *s).contiguous().to(device, dtype)
        for p, s in zip(vectors.split(sizes, 1), shapes, strict=True)
    ]
    return users, basis, direction.to(device)


def copies(tensors):
    return [t.clone() for t in tensors]


def assert_close_to_oracle(user, basis, direction, rho=0.5) -> Tensor:
    """Dots within a few float32 roundings of their terms, elements within a storage rounding."""
    rank = len(direction)
    before, expected = copies(user), copies(user)
    want = reference.subspace_surgery_(expected, basis, direction, rho)
    terms = reference.subspace_surgery_(
        [u.abs() for u in user], [b.abs() for b in basis], direction.abs(), 0.0
    )
    got = subspace_surgery_(user, basis, direction, rho)
    assert got.shape == (2 + 2 * rank,)
    assert got.dtype == torch.float64
    bound = 8 * 2.0**-24 * terms[1 : 2 + rank] + 1e-300
    assert torch.all((got - want)[1 : 2 + rank].abs() <= bound)
    dots, coefficients = got[2 : 2 + rank], got[2 + rank :]
    torch.testing.assert_close(got[0], direction @ dots, rtol=1e-12, atol=1e-300)
    exact = rho * direction - (dots if got[0] < 0 else 0)
    torch.testing.assert_close(coefficients, exact, rtol=1e-15, atol=0)
    for u, old, vectors in zip(user, before, basis, strict=True):
        added = coefficients.view(-1, *[1] * old.dim()) * vectors.double()
        exact = old.double() + added.sum(0)
        size = old.double().abs() + added.abs().sum(0)
        # The result is rounded once to its dtype; float32 sums and coefficients before that.
        allowed = 0.51 * torch.finfo(u.dtype).eps * exact.abs() + (rank + 2) * 2.0**-24 * size
        assert torch.all((u.double() - exact).abs() <= allowed + torch.finfo(u.dtype).tiny)
    return got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("conflict", [True, False])
def test_equals_the_oracle(dtype, rank, conflict, device):
    call = make(dtype=dtype, rank=rank, conflict=conflict, device=device)
    got = assert_close_to_oracle(*call)
    assert (float(got[0]) < 0) == conflict


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 5, 15, 16, 17, 1023, 1024, 1025, 33_000]), min_size=1),
    rank=st.integers(1, 16),
    dtype=st.sampled_from(DTYPES),
    rho=st.sampled_from([0.0, 0.3, 7.0]),
    conflict=st.booleans(),
)
def test_sizes(sizes, rank, dtype, rho, conflict):
    if sum(sizes) < rank:
        return
    assert_close_to_oracle(*make([(n,) for n in sizes], dtype, rank, conflict), rho)


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_agree(dtype, isa):
    assert_close_to_oracle(*make(dtype=dtype, rank=6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_avx2_and_avx512_agree_bit_by_bit_and_so_do_threads(dtype):
    if not {"avx2", "avx512"} <= set(_C.cpu_isas()):
        pytest.skip("this machine has one instruction set only")
    user, basis, direction = make(dtype=dtype, rank=7)
    found = []
    before = torch.get_num_threads()
    try:
        for isa, threads in (("avx2", 1), ("avx512", 1), ("avx512", 3)):
            _C.set_cpu_isa(isa)
            torch.set_num_threads(threads)
            own = copies(user)
            found.append([subspace_surgery_(own, basis, direction, 0.2), *own])
    finally:
        _C.set_cpu_isa("auto")
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("conflict", [True, False])
@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_rank_one_is_surgery(conflict, rho, device):
    user, basis, _ = make(rank=1, conflict=conflict, device=device)
    align = [3.0 * b[0] * (-1 if conflict else 1) for b in basis]
    dot = sum(float((u * a).sum()) for u, a in zip(user, align, strict=True))
    align = align if (dot < 0) == conflict else [-a for a in align]
    norm = math.sqrt(sum(float(a.double().square().sum()) for a in align))
    sign = torch.sign(sum((a * b[0]).sum() for a, b in zip(align, basis, strict=True)))
    direction = (norm * sign.double()).reshape(1)
    expected = copies(user)
    want = surgery_(expected, align, rho)
    got = subspace_surgery_(user, basis, direction, rho)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=0)
    for a, b in zip(user, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_without_a_conflict_and_rho_nothing_is_written():
    user, basis, direction = make(conflict=False)
    before = copies(user)
    subspace_surgery_(user, basis, direction)
    assert all(map(torch.equal, user, before))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["user", "basis", "direction"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_values_that_are_not_finite_leave_the_gradient_alone(where, value, device):
    user, basis, direction = make(device=device)
    target = {"user": user[1], "basis": basis[1], "direction": direction}[where]
    if where == "direction" and value == 1e30:
        value = 1e39  # no float32 coefficient
    target.view(-1)[1] = value
    if where == "basis" and value == 1e30:
        user[1].fill_(1e30)
    before = copies(user)
    got = subspace_surgery_(user, basis, direction, 0.5)
    assert math.isnan(got[0])
    assert got[2 + len(direction) :].isnan().all()
    for a, b in zip(user, before, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_the_error_is_at_most_twice_that_of_the_plain_formula():
    for dtype in DTYPES:
        user, basis, direction = make([(2000, 60)], dtype, rank=8)
        exact, plain = copies(user), copies(user)
        exact = [u.double() for u in exact]
        reference.subspace_surgery_(exact, [b.double() for b in basis], direction, 0.3)
        reference.subspace_surgery_(plain, basis, direction, 0.3, dtype=None)
        subspace_surgery_(user, basis, direction, 0.3)
        ours, theirs = (float((t[0].double() - exact[0]).norm()) for t in (user, plain))
        assert ours <= 2 * theirs


def test_an_empty_list():
    direction = torch.tensor([1.0, -2.0], dtype=torch.float64)
    out = subspace_surgery_([], [], direction, 0.5)
    assert out.tolist() == [0, 0, 0, 0, 0.5, -1.0]


def test_other_memory_is_untouched_and_versions_count():
    user, basis, direction = make()
    vectors = copies(basis)
    versions = [u._version for u in user]
    subspace_surgery_(user, basis, direction)
    assert all(map(torch.equal, basis, vectors))
    assert all(u._version > v for u, v in zip(user, versions, strict=True))


def test_opcheck_and_compile():
    user, basis, direction = make([(5, 7), (3,)])
    op = torch.ops.gradsafe.subspace_surgery_.default
    torch.library.opcheck(op, (copies(user), basis, direction, 0.5))
    eager, compiled = copies(user), copies(user)
    want = subspace_surgery_(eager, basis, direction, 0.5)
    got = torch.compile(subspace_surgery_, fullgraph=True)(compiled, basis, direction, 0.5)
    assert torch.equal(got, want)
    assert all(map(torch.equal, eager, compiled))


A, B, D = [torch.ones(3, 4)], [torch.ones(2, 3, 4)], torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: subspace_surgery_(A[0], B, D), TypeError, "user to be a list"),
        (lambda: subspace_surgery_(A, [None], D), TypeError, r"basis\[0\] to be a tensor"),
        (lambda: subspace_surgery_(A, [], D), ValueError, "basis to hold 1"),
        (lambda: subspace_surgery_(A, A, D), ValueError, r"basis\[0\] of shape \[2, 3, 4\]"),
        (lambda: subspace_surgery_(A, B, D.float()), TypeError, "direction of dtype float64"),
        (lambda: subspace_surgery_(A, B, D[None]), ValueError, r"direction of shape \[k\]"),
        (lambda: subspace_surgery_(A, B, D[:0]), ValueError, "1 to 16 vectors"),
        (lambda: subspace_surgery_(A, B, torch.ones(17).double()), ValueError, "1 to 16"),
        (lambda: subspace_surgery_(A, [B[0].half()], D), TypeError, r"basis\[0\] of dtype"),
        (lambda: subspace_surgery_([a.int() for a in A], B, D), TypeError, r"user\[0\] of dtype"),
        (lambda: subspace_surgery_([torch.ones(4, 3).T], B, D), ValueError, "contiguous"),
        (lambda: subspace_surgery_([A[0].clone().requires_grad_()], B, D), ValueError, "detach"),
        (lambda: subspace_surgery_(A, B, D, rho=-1.0), ValueError, "rho"),
        (lambda: subspace_surgery_(A, B, D, rho=math.nan), ValueError, "rho"),
        (lambda: subspace_surgery_([B[0][0]], B, D), RuntimeError, "share memory"),
    ],
)
def test_bad_arguments_name_the_argument(call, kind, text):
    with pytest.raises(kind, match=text):
        call()

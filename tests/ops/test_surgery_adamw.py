from __future__ import annotations

import math

import pytest
import torch

from gradsafe._backend import _C
from gradsafe.ops import _default as reference
from gradsafe.ops import surgery_, surgery_adamw_, surgery_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(7, 33), (40_000,), (), (3, 300), (0, 2)]
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def make(shapes=SHAPES, dtype=torch.float32, device="cpu", taken=3.0):
    """params, user, align, exp_avg, exp_avg_sq, step after `taken` steps; a clear conflict."""
    user = [torch.randn(shape) for shape in shapes]
    lists = [
        [torch.randn(shape) for shape in shapes],
        user,
        [torch.randn_like(u) - 2 * u for u in user],
        [torch.randn(shape) * 0.3 for shape in shapes],
        [torch.rand(shape) + 0.1 for shape in shapes],
    ]
    moved = [[t.to(device, dtype) for t in tensors] for tensors in lists]
    return [*moved, [torch.full((), taken, device=device) for _ in shapes]]


def copies(state):
    return [[t.clone() for t in tensors] for tensors in state]


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [None, [0, 1, 0, 2, 1]])
def test_equals_the_oracle(groups, dtype, device):
    state = make(dtype=dtype, device=device)
    expected = copies(state)
    want = reference.surgery_adamw_(*expected, rho=0.5, groups=groups, **OPTIONS)
    got = surgery_adamw_(*state, rho=0.5, groups=groups, **OPTIONS)
    assert got.shape == ((4,) if groups is None else (3, 4))
    assert torch.allclose(got, want, rtol=1e-5)
    unit = torch.finfo(dtype).eps
    for name, mine, oracle in zip("puamvs", state, expected, strict=True):
        for a, b in zip(mine, oracle, strict=True):
            error = (a.double() - b.double()).abs()
            assert torch.all(error <= unit * b.double().abs() + 2e-6), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    assert _C.cpu_isa() == isa
    test_equals_the_oracle(None, dtype, "cpu")


def run_torch(params, gradients, fused):
    """100 steps of PyTorch on the gradients merged by the plain definition in their own dtype."""
    params = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(params, **OPTIONS, fused=fused)
    for user, align in gradients:
        merged = [u.clone() for u in user]
        sums = reference.surgery_sums(user, align)
        reference.surgery_merge_(merged, align, sums, dtype=None)
        for p, g in zip(params, merged, strict=True):
            p.grad = g
        optimizer.step()
    return params


def run_operator(step_function, params, gradients):
    params = [p.clone() for p in params]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    step = torch.zeros((), device=params[0].device)
    results = [
        step_function(params, user, align, first, second, step, **OPTIONS)
        for user, align in gradients
    ]
    assert step.item() == len(gradients)
    return params, torch.stack(results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_follows_pytorch_over_100_steps_with_gate_flips(dtype, fused, device):
    shapes = [(40, 50), (33,)]
    params = [torch.randn(shape).to(device, dtype) for shape in shapes]
    gradients = [
        tuple([torch.randn(shape).to(device, dtype) for shape in shapes] for _ in range(2))
        for _ in range(100)
    ]
    ours, results = run_operator(surgery_adamw_, params, gradients)
    conflicts = int((results[:, 3] > 1).sum())
    assert 20 < conflicts < 80
    exact, want = run_operator(
        reference.surgery_adamw_,
        [p.double() for p in params],
        [tuple([t.double() for t in ts] for ts in pair) for pair in gradients],
    )
    assert torch.equal(results[:, 3] > 1, want[:, 3] > 1)
    theirs = run_torch(params, gradients, fused)
    our_error, their_error = (flat(x) - flat(exact) for x in (ours, theirs))
    assert our_error.norm() <= 2 * their_error.norm()
    if dtype == torch.float32:
        assert our_error.abs().max() <= 1e-5


def test_equals_surgery_then_a_plain_step():
    """Merging beforehand and adding nothing in the step changes float32 roundings only."""
    state = make()
    apart = copies(state)
    surgery_(apart[1], apart[2])
    surgery_adamw_(*state, **OPTIONS)
    surgery_adamw_(*apart[:2], [torch.zeros_like(a) for a in apart[2]], *apart[3:], **OPTIONS)
    for index in (0, 3, 4):
        assert torch.allclose(flat(state[index]), flat(apart[index]), rtol=1e-5, atol=1e-6)


def test_gradients_are_only_read():
    state = make()
    before = copies(state)
    surgery_adamw_(*state)
    for index in (1, 2):
        assert torch.equal(flat(state[index]), flat(before[index]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
@pytest.mark.parametrize("groups", [None, [0, 1, 0, 2, 1]])
def test_a_non_finite_gradient_skips_the_whole_step(groups, bad, device):
    state = make(device=device)
    state[1][1][12] = bad
    before = copies(state)
    result = surgery_adamw_(*state, groups=groups)
    assert result[..., 3].isnan().all()
    assert result.view(-1, 4)[:, :3].isfinite().all(1).tolist() == (
        [False] if groups is None else [True, False, True]
    )
    for tensors, old in zip(state, before, strict=True):
        assert all(
            torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(tensors, old, strict=True)
        )


def test_given_sums_replace_the_first_pass():
    state, groups = make(), [0, 1, 0, 2, 1]
    other = copies(state)
    whole = surgery_adamw_(*state, groups=groups)
    sums = surgery_sums(other[1], other[2], groups)
    assert torch.equal(surgery_adamw_(*other, groups=groups, sums=sums), whole)
    for a, b in zip(state, other, strict=True):
        assert torch.equal(flat(a), flat(b))


def test_one_counter_or_one_each():
    state = make()
    other = copies(state)
    single = torch.full((1,), 3.0)
    surgery_adamw_(*state)
    surgery_adamw_(*other[:5], single)
    assert [s.item() for s in state[5]] == [4.0] * len(SHAPES)
    assert single.item() == 4.0
    assert torch.equal(flat(state[0]), flat(other[0]))


@pytest.mark.parametrize("taken", [0.0, 1e4, 1e6])
def test_any_number_of_steps_taken(taken):
    state = make(taken=taken)
    expected = copies(state)
    reference.surgery_adamw_(*expected)
    surgery_adamw_(*state)
    assert torch.allclose(flat(state[0]), flat(expected[0]), rtol=1e-5, atol=1e-6)


def test_parameters_may_require_gradients_and_autograd_notices():
    state = make([(3,)])
    state[0][0].requires_grad_()
    loss = (state[0][0] * state[0][0]).sum()
    result = surgery_adamw_(*state)
    assert not result.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_vector_levels_and_threads_agree_bit_by_bit():
    levels = [level for level in ("avx2", "avx512") if level in _C.cpu_isas()]
    before = torch.get_num_threads()
    for dtype in DTYPES:
        state = make([(600, 210), (5, 5), (64,)], dtype)
        results = []
        for level in levels:
            for threads in (1, 2, 3):
                _C.set_cpu_isa(level)
                torch.set_num_threads(threads)
                mine = copies(state)
                results.append([surgery_adamw_(*mine), *(flat(t) for t in mine)])
        _C.set_cpu_isa("auto")
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_layouts_and_odd_alignment(dtype):
    state = make([(50, 70)], dtype)
    views = [[t.t() for t in tensors] for tensors in copies(state[:5])]
    step = [state[5][0].clone()]
    surgery_adamw_(*views, step)
    surgery_adamw_(*state)
    assert torch.equal(views[0][0].t(), state[0][0])
    memory = [torch.rand(40_011).to(dtype) for _ in range(5)]
    shifted = [[t[offset : offset + 40_000]] for offset, t in enumerate(memory, start=1)]
    expected = copies(shifted)
    ends = [
        (t[:offset].clone(), t[offset + 40_000 :].clone()) for offset, t in enumerate(memory, 1)
    ]
    surgery_adamw_(*shifted, step)
    surgery_adamw_(*expected, [step[0] - 1])
    for a, b in zip(shifted, expected, strict=True):
        assert torch.equal(a[0], b[0])
    for offset, (t, (head, tail)) in enumerate(zip(memory, ends, strict=True), start=1):
        assert torch.equal(t[:offset], head)
        assert torch.equal(t[offset + 40_000 :], tail)


def test_empty_lists():
    step = torch.zeros(())
    assert surgery_adamw_([], [], [], [], [], step, rho=0.3).tolist() == [0.0, 0.0, 0.0, 0.3]
    assert surgery_adamw_([], [], [], [], [], [], groups=[]).shape == (0, 4)


def test_opcheck():
    p, u, a, m, v, steps = make([(5, 7), (2, 3)])
    operator = torch.ops.gradsafe.surgery_adamw_.default
    sums = surgery_sums(u, a, [1, 0])
    scalars = (1.0, 1e-2, 0.9, 0.99, 1e-8, 0.1)
    torch.library.opcheck(operator, (p, u, a, m, v, steps, None, *scalars, [], 1))
    torch.library.opcheck(operator, (p, u, a, m, v, steps[:1], sums, *scalars, [1, 0], 2))


def test_compiles_into_one_graph():
    compiled = torch.compile(surgery_adamw_, fullgraph=True, backend="aot_eager")
    state = make([(6, 9), (3, 20)])
    expected = copies(state)
    assert torch.equal(compiled(*state, **OPTIONS), surgery_adamw_(*expected, **OPTIONS))
    for a, b in zip(state, expected, strict=True):
        assert torch.equal(flat(a), flat(b))


def changed(index, value, **options):
    """A call with one argument replaced."""

    def call():
        state = make([(3, 4)])
        state[index] = value
        return surgery_adamw_(*state, **options)

    return call


T = torch.ones(3, 4)
BAD_CALLS = [
    (changed(0, T), TypeError, "params to be a list of tensors, got Tensor"),
    (changed(1, []), ValueError, "user to hold 1 tensors like params, got 0"),
    (changed(1, [T[:2]]), ValueError, r"user\[0\] of shape \[3, 4\] like params\[0\]"),
    (changed(2, [T.half()]), TypeError, r"align\[0\] of dtype torch.float32"),
    (changed(3, [torch.ones(4, 3).t()]), ValueError, r"exp_avg\[0\] with strides \[4, 1\]"),
    (changed(4, [T.double()]), TypeError, r"exp_avg_sq\[0\] of dtype torch.float32"),
    (changed(4, [T.to("meta")]), ValueError, r"exp_avg_sq\[0\] on cpu"),
    (changed(5, [torch.ones(()), torch.ones(())]), ValueError, "one step counter for each of 1"),
    (changed(5, torch.ones(2)), ValueError, r"step with one element, got shape \[2\]"),
    (changed(5, [torch.ones((), dtype=torch.int64)]), TypeError, r"step\[0\] of dtype"),
    (changed(5, torch.ones((), device="meta")), ValueError, "step on cpu"),
    (changed(1, [T], lr=-1.0), ValueError, "lr to be finite and >= 0, got -1.0"),
    (changed(1, [T], lr=torch.ones(())), TypeError, "lr to be a number, got a tensor"),
    (changed(1, [T], eps=math.nan), ValueError, "eps to be finite"),
    (changed(1, [T], betas=(0.9, 1.0)), ValueError, r"betas\[1\] at least 0 and below 1, got 1.0"),
    (changed(1, [T], betas=(0.9,)), TypeError, r"betas to be a pair of numbers, got \(0.9,\)"),
    (changed(1, [T], betas=(0.9, 0.9, 0.9)), TypeError, "betas to be a pair of numbers"),
    (changed(1, [T], betas=(0.9, "1")), TypeError, r"betas\[1\] to be a number, got '1'"),
    (changed(1, [T], betas=(math.nan, 0.9)), ValueError, r"betas\[0\] at least 0 and below 1"),
    (changed(1, [T], rho=math.inf), ValueError, "rho to be finite"),
    (changed(1, [T], sums=torch.ones(3)), TypeError, "sums of dtype float64"),
    (changed(1, [T.clone().requires_grad_()]), ValueError, r"call \.detach\(\) first"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_bad_arguments_name_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_written_tensors_may_not_overlap():
    for a, b in ((0, 1), (0, 3), (3, 4), (2, 4)):
        state = make([(3, 4)])
        state[a] = state[b]
        with pytest.raises(RuntimeError, match="not to share memory"):
            surgery_adamw_(*state)
    state = make([(3, 4)])
    sums = torch.zeros(8, dtype=torch.float64)
    for index in (0, 3, 4):
        state = make([(3, 4)])
        state[index] = [sums.view(torch.float32)[:12].view(3, 4)]
        with pytest.raises(RuntimeError, match="sums not to share memory"):
            surgery_adamw_(*state, sums=sums[5:])
    state = make([(3, 4)])
    state[5] = sums.view(torch.float32)[0]
    with pytest.raises(RuntimeError, match="sums not to share memory"):
        surgery_adamw_(*state, sums=sums[:3])
    state = make([(3, 4)])
    state[2] = state[1]  # both are only read
    surgery_adamw_(*state)


def test_the_backend_checks_again():
    p, u, a, m, v, steps = make([(5, 7)])
    scalars = (1.0, 1e-2, 0.9, 0.99, 1e-8, 0.1)
    sums = torch.ones(1, 3, dtype=torch.float64)
    for arguments, text in (
        ((p, u, a, [], v, steps, None), "1 tensors in exp_avg like params, got 0"),
        ((p, u, a, [m[0].half()], v, steps, None), r"exp_avg\[0\] of the dtype of user\[0\]"),
        (([p[0][:2]], u, a, m, v, steps, None), r"params\[0\] of shape \[5, 7\]"),
        ((p, u, a, m, v, [], None), "1 step counters or one for all, got 0"),
        ((p, u, a, m, v, [torch.ones(2)], None), r"step\[0\] with one float32 element"),
        ((p, u, a, m, v, steps, sums.float()), r"sums of shape \[G, 3\]"),
        ((p, u, a, m, v, steps, sums.expand(2, 3).contiguous()), "sums of 1 groups, got 2"),
    ):
        with pytest.raises(RuntimeError, match=text):
            torch.ops.gradsafe.surgery_adamw_(*arguments, *scalars, [], 1)

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from gradsafe._backend import _C
from gradsafe.ops import _default as reference
from gradsafe.ops import kl_divergence, kl_divergence_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}
INF, NAN = float("inf"), float("nan")


def make(shape, dtype=torch.float32, teacher_dtype=None, device="cpu", spread=3.0):
    """Student logits, teacher logits near them, weights with a zero among them."""
    student = torch.randn(shape) * spread
    teacher = student + torch.randn(shape)
    weight = torch.rand(shape[0]) + 0.5
    weight[1::4] = 0
    return (
        student.to(device, dtype),
        teacher.to(device, teacher_dtype or dtype),
        weight.to(device),
    )


def solve(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradient; the student's logits are kept."""
    buffer = torch.full(
        (student.shape[0], student.stride(0) or 1), 7.0, dtype=student.dtype, device=student.device
    )
    buffer = buffer[:, : student.shape[1]] if student.shape[0] > 1 else student.clone()
    buffer.copy_(student)
    return kl_divergence_(buffer, teacher, weight), buffer


def oracle(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    gradient = student.cpu().double()
    return reference.kl_divergence_(gradient, teacher.cpu(), weight.cpu()), gradient


def below_largest(logits: Tensor) -> Tensor:
    logits = logits.cpu().double()
    return logits - logits.amax(1, keepdim=True)


def assert_close_to_oracle(student, teacher, weight, ulps=8.0):
    """Errors within a few float32 roundings: of the probabilities, then one of the buffer.

    A logit's distance d from the largest one is rounded to float32 before its exponential is
    taken, which costs a probability d roundings.
    """
    value, gradient = solve(student, teacher, weight)
    wanted, wanted_gradient = oracle(student, teacher, weight)
    assert value.dtype == torch.float32
    assert torch.equal(value, kl_divergence(student, teacher))
    # The value is a mean of logit differences, of logits relative to the largest of their row.
    apart = (below_largest(teacher) - below_largest(student)).abs()
    spread = apart.nan_to_num(0, posinf=0).amax(1) + 1
    assert torch.all((value.cpu() - wanted).abs() <= ulps * 2.0**-24 * spread)
    bound = (
        2.0**-24
        * weight.cpu().double()[:, None]
        * sum(
            logits.softmax(1) * ((logits.amax(1, keepdim=True) - logits).clamp(max=200) + ulps)
            for logits in (student.cpu().double(), teacher.cpu().double())
        )
    )
    bound += ULP[student.dtype] * wanted_gradient.abs() + SMALLEST[student.dtype]
    assert torch.all((gradient.cpu().double() - wanted_gradient).abs() <= bound + 1e-37)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "teacher_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_equals_the_oracle_for_every_dtype(dtype, teacher_dtype, device):
    for shape in [(5, 1), (3, 17), (9, 1031), (2, 5000)]:
        assert_close_to_oracle(*make(shape, dtype, teacher_dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    assert _C.cpu_isa() == isa
    for shape in [(3, 16), (7, 33), (4, 2061)]:
        assert_close_to_oracle(*make(shape, dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_vocabulary(device):
    assert_close_to_oracle(*make((3, 128_256), torch.bfloat16, device=device))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6),
    vocabulary=st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 1023, 1024, 1025, 2047, 3077]),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 0.1, 5.0, 40.0]),
    shift=st.sampled_from([0.0, -500.0, 300.0, 3e4]),
)
def test_shapes_spreads_and_shifts(rows, vocabulary, dtype, spread, shift):
    student, teacher, weight = make((rows, vocabulary), dtype, spread=spread)
    student += shift
    assert_close_to_oracle(student, teacher, weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_one_logit_has_no_divergence(dtype, device):
    student, teacher = torch.randn(2, 50, 1, device=device).mul(3000).to(dtype)
    # 16-bit logits on a GPU: either sum is one exponential, within 2 ulp.
    bound = 4 * 2.0**-23 if device == "cuda" and dtype.itemsize == 2 else 0.0
    assert float(kl_divergence(student, teacher).max()) <= bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_cost_no_accuracy(dtype, device):
    ours, plain = torch.zeros(2, dtype=torch.float64)
    for _ in range(20):
        student = (torch.randn(8, 2051) * 3 + 3000).to(dtype)
        teacher = (torch.randn(8, 2051) * 3 - 1000).to(dtype)
        wanted = reference.kl_divergence(student, teacher)
        eager = reference.kl_divergence(student, teacher, torch.float32)
        got = kl_divergence(student.to(device), teacher.to(device)).cpu()
        ours, plain = (e + (v - wanted).square().sum() for e, v in ((ours, got), (plain, eager)))
    assert ours <= plain


def test_exponentials_are_exact_to_a_few_roundings(isa):
    """With an impossible second token the gradient of the first is -weight * e^x / (1 + e^x)."""
    x = -torch.rand(200_000) * 87
    student = torch.stack([x, torch.zeros_like(x)], 1)
    teacher = torch.tensor([[-INF, 0.0]]).expand(len(x), 2)
    kl_divergence_(student, teacher, torch.ones(len(x)))
    exact = torch.exp(x.double()) / (1 + torch.exp(x.double()))
    assert ((student[:, 0] - exact).abs() / exact).max() <= 4 * 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [1.0, 0.01])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, apart):
    ours, plain = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(20):  # a single draw can be exact by luck; compare root mean squares
        student = torch.randn(8, 4001) * 3
        teacher = (student + apart * torch.randn(8, 4001)).to(dtype)
        student, weight = student.to(dtype), torch.rand(8)
        wanted, wanted_gradient = oracle(student, teacher, weight)
        leaf = student.float().clone().requires_grad_()
        eager = functional.kl_div(
            leaf.log_softmax(1), teacher.float().softmax(1), reduction="none"
        ).sum(1)
        (eager_gradient,) = torch.autograd.grad(eager @ weight, leaf)
        value, gradient = solve(student, teacher, weight)
        found = ((ours, value, gradient), (plain, eager.detach(), eager_gradient.to(dtype)))
        for total, a, b in found:
            total[0] += (a.double() - wanted).square().sum()
            total[1] += (b.double() - wanted_gradient).square().sum()
    assert torch.all(ours.sqrt() <= 2 * plain.sqrt())


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_equals_autograd_of_the_definition(device):
    student, teacher, weight = make((6, 300), device=device)
    leaf = student.double().requires_grad_()
    loss = reference.kl_divergence(leaf, teacher) @ weight.double()
    loss.backward()
    _, gradient = solve(student, teacher, weight)
    assert torch.allclose(gradient.double(), leaf.grad, rtol=0, atol=1e-6)


def test_the_form_that_keeps_the_logits_is_differentiable():
    student, teacher, weight = make((6, 300), torch.bfloat16)
    kept = student.clone()
    leaf = student.requires_grad_()
    (kl_divergence(leaf, teacher) @ weight).backward()
    assert torch.equal(leaf.detach(), kept)
    _, gradient = solve(kept, teacher, weight)
    assert torch.equal(leaf.grad, gradient)
    with pytest.raises(NotImplementedError, match="teacher_logits; detach"):
        kl_divergence(kept, teacher.requires_grad_()).sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_give_exactly_zero(dtype, device):
    student, _, weight = make((7, 1037), dtype, device=device)
    student[2, 5] = -INF
    value, gradient = solve(student, student.clone(), weight)
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("device", DEVICES)
def test_a_masked_vocabulary(device):
    student, teacher, weight = make((8, 2100), device=device)
    teacher[:, 1200:] = -INF  # whole segments, behind and before the others
    teacher[3, :1100] = -INF
    student[2, 1300:] = -INF  # masked on both sides
    weight[:] = 1
    assert_close_to_oracle(student, teacher, weight)
    value, gradient = solve(student, teacher, weight)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    student[4, 7] = -INF
    value, gradient = solve(student, teacher, weight)
    assert value[4] == INF
    assert torch.isfinite(value).sum() == 7
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_vanishing_probability_cannot_hide_nan_and_makes_no_nan(device):
    """Early columns lose all weight when a much larger logit follows, or are infinite."""
    student, teacher, weight = make((3, 3000), device=device)
    weight[:] = 1
    student[:, 2900], teacher[:, 2900] = 600, 600
    student[1, 0] = NAN
    student[2, 0] = -INF
    value, gradient = solve(student, teacher, weight)
    assert torch.isfinite(value).tolist() == [True, False, True]
    assert torch.isfinite(gradient).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_non_finite_logits_reach_their_row_and_no_other(bad, side, device):
    for column in (0, 700, 1699):
        student, teacher, weight = make((6, 1700), device=device)
        (student, teacher)[side][2, column] = bad
        value, gradient = solve(student, teacher, weight)
        assert torch.isnan(value).nonzero().flatten().tolist() == [2]
        assert torch.isnan(gradient).all(1).nonzero().flatten().tolist() == [2]
        assert torch.isnan(gradient).any(1).sum() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_without_any_token_is_nan(device):
    student, teacher, weight = make((3, 40), device=device)
    weight[:] = 1
    teacher[1] = -INF
    value, gradient = solve(student, teacher, weight)
    assert torch.isnan(value).tolist() == [False, True, False]
    assert torch.isnan(gradient).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_zero_writes_zeros_and_reports_the_value(dtype, device):
    student, teacher, _ = make((4, 1001), dtype, device=device)
    student[2, 3] = NAN
    value, gradient = solve(student, teacher, torch.zeros(4, device=device))
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.equal(torch.signbit(gradient), torch.zeros_like(gradient, dtype=torch.bool))
    assert torch.isnan(value).tolist() == [False, False, True, False]
    assert value[0] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_levels_agree_bit_by_bit(dtype):
    if not {"avx2", "avx512"} <= set(_C.cpu_isas()):
        pytest.skip("needs a machine with AVX-512")
    arguments = make((40, 3077), dtype)
    results = []
    for level in ("avx2", "avx512"):
        _C.set_cpu_isa(level)
        results.append(solve(*arguments))
    _C.set_cpu_isa("auto")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_16_bit_gradients_round_like_pytorch(isa):
    """The same float32 values, rounded by PyTorch: subnormals, ties and all."""
    student, teacher, weight = make((30, 2011))
    weight = torch.logspace(-4, 4, 30)
    _, exact = solve(student, teacher, weight)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = student.to(dtype)
        _, single = solve(narrow.float(), teacher, weight)
        _, rounded = solve(narrow, teacher, weight)
        assert torch.equal(rounded, single.to(dtype))
    assert exact.dtype == torch.float32


def test_bitwise_equal_for_any_number_of_threads_and_any_neighbours():
    student, teacher, weight = make((50, 4099))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(solve(student, teacher, weight))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    value, gradient = solve(student[20:31], teacher[20:31], weight[20:31])
    assert torch.equal(value, results[0][0][20:31])
    assert torch.equal(gradient, results[0][1][20:31])


@pytest.mark.gpu
def test_gpu_is_deterministic_and_agrees_with_the_cpu():
    arguments = make((33, 5003), torch.bfloat16, device="cuda")
    first, second = solve(*arguments), solve(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close_to_oracle(*arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_around_the_views_is_neither_read_nor_written(dtype, device):
    student, teacher, weight = make((13, 187), dtype, device=device)
    big = torch.full((20, 301), NAN, dtype=dtype, device=device)
    big_teacher = torch.full((16, 260), NAN, dtype=dtype, device=device)
    view, teacher_view = big[3:16, 5:192], big_teacher[2:15, 1:188]
    view.copy_(student)
    teacher_view.copy_(teacher)
    value = kl_divergence_(view, teacher_view, weight)
    wanted, gradient = solve(student.contiguous(), teacher, weight)
    assert torch.equal(value, wanted)
    assert torch.equal(view, gradient)
    view.fill_(NAN)
    assert torch.isnan(big).all()


def test_one_teacher_row_for_all():
    student, teacher, weight = make((5, 70))
    broadcast = teacher[:1].expand(5, 70)
    value, gradient = solve(student, broadcast, weight)
    wanted, wanted_gradient = solve(student, broadcast.contiguous(), weight)
    assert torch.equal(value, wanted)
    assert torch.equal(gradient, wanted_gradient)


def test_no_rows():
    value = kl_divergence_(torch.empty(0, 5), torch.empty(0, 5), torch.empty(0))
    assert value.shape == (0,)
    assert kl_divergence(torch.empty(0, 5), torch.empty(0, 5)).shape == (0,)


def test_invariance_to_shifts_and_order_of_the_vocabulary():
    student, teacher, weight = make((6, 900))
    value, gradient = solve(student, teacher, weight)
    order = torch.randperm(900)
    shuffled, moved = solve(student[:, order] + 3, teacher[:, order] - 8, weight)
    assert torch.allclose(shuffled, value, rtol=1e-5, atol=1e-6)
    assert torch.allclose(moved, gradient[:, order], rtol=1e-4, atol=1e-6)
    assert gradient.double().sum(1).abs().max() < 1e-6  # both distributions sum to 1
    assert torch.all(value > 0)


def test_opcheck():
    for dtype in DTYPES:
        student, teacher, weight = make((4, 37), dtype)
        torch.library.opcheck(torch.ops.gradsafe.kl_divergence_.default, (student, teacher, weight))
        torch.library.opcheck(
            torch.ops.gradsafe.kl_divergence.default, (student.requires_grad_(), teacher)
        )


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(student, teacher, weight):
        buffer = student * 2
        value = kl_divergence_(buffer, teacher, weight)
        return value, buffer, kl_divergence(student, teacher)

    student, teacher, weight = make((6, 90))
    value, buffer, plain = step(student, teacher, weight)
    wanted, gradient = solve(student * 2, teacher, weight)
    assert torch.equal(value, wanted)
    assert torch.equal(buffer, gradient)
    assert torch.equal(plain, kl_divergence(student, teacher))


def test_autograd_sees_that_the_buffer_changed():
    leaf = torch.randn(3, 9, requires_grad=True)
    logits = leaf * 2
    loss = (logits * logits).sum()  # saves the logits
    kl_divergence_(logits.detach(), torch.randn(3, 9), torch.ones(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_that_is_written_belongs_to_the_student_alone():
    def aliases(buffer):
        logits, free = buffer[:, :8], torch.ones(4)
        yield logits, logits, free
        yield logits, buffer[:, 5:13], free
        yield logits, buffer[:, 7:15], free
        yield logits, buffer.view(-1)[30 : 30 + 32].view(4, 8), free  # other steps between rows
        yield buffer[:, 12:], buffer.view(-1)[30 : 30 + 32].view(4, 8)[:, :8], free
        yield logits[1:], logits[:1].expand(3, 8), free[1:]
        yield logits[1:], logits[1:2].expand(3, 8), free[1:]
        yield logits, torch.zeros(4, 8), buffer[0, 4:8]
        yield logits, torch.zeros(4, 8), buffer[3, 6:10]
        yield logits, torch.zeros(4, 8), buffer.view(torch.int32)[2, 8:12].view(torch.float32)

    for number, _ in enumerate(aliases(torch.zeros(4, 20))):
        buffer = torch.randn(4, 20)
        student, teacher, weight = list(aliases(buffer))[number]
        cells = [
            set(
                torch.arange(80)
                .as_strided(t.shape, t.stride(), t.storage_offset())
                .flatten()
                .tolist()
            )
            for t in (student, teacher, weight)
            if t.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        ]
        before = buffer.clone()
        if cells[0] & set().union(*cells[1:]):
            with pytest.raises(RuntimeError, match=r"student_logits and .* not to share memory"):
                kl_divergence_(student, teacher, weight)
            assert torch.equal(buffer, before)
        else:
            clones = student.clone(), teacher.clone(), weight.clone()
            kl_divergence_(student, teacher, weight)
            kl_divergence_(*clones)
            assert torch.equal(student, clones[0])


def test_a_second_derivative_is_refused():
    student, teacher, _ = make((4, 9))
    student.requires_grad_()
    for power in (1, 2):
        value = kl_divergence(student, teacher).pow(power).sum()
        (first,) = torch.autograd.grad(value, student, create_graph=True)
        with pytest.raises(NotImplementedError, match="kl_divergence has no second derivative"):
            torch.autograd.grad(first.square().sum(), student)


def test_forward_mode_is_refused():
    student, teacher, weight = make((4, 9))
    for name in (0, 1):
        logits = [student, teacher]

        def value(moved, logits=logits, name=name):
            logits[name] = moved
            return kl_divergence(*logits)

        with pytest.raises(NotImplementedError, match=r"kl_divergence: .* without a tangent"):
            torch.func.jvp(value, (logits[name],), (torch.ones(4, 9),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(teacher, torch.ones(4, 9))
        with pytest.raises(NotImplementedError, match="teacher_logits without a tangent"):
            kl_divergence_(student, dual, weight)
        kl_divergence_(student, teacher, weight)


def test_meta_tensors_have_the_real_shapes():
    student, teacher, weight = (t.to("meta") for t in make((6, 9)))
    for value in (kl_divergence(student, teacher), kl_divergence_(student, teacher, weight)):
        assert value.is_meta
        assert value.shape == (6,)
        assert value.dtype == torch.float32


S, T, W = torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3)
BAD_CALLS = [
    (lambda: kl_divergence([S], T), TypeError, "student_logits to be a tensor, got list"),
    (lambda: kl_divergence(S[0], T), ValueError, r"student_logits of shape \[N, V\], got \[4\]"),
    (lambda: kl_divergence(S.double(), T), TypeError, "bfloat16 or float16, got torch.float64"),
    (lambda: kl_divergence(S, T[:2]), ValueError, r"of shape \[3, 4\], got \[2, 4\]"),
    (lambda: kl_divergence(S.T, T.T), ValueError, r"call \.contiguous\(\) first"),
    (lambda: kl_divergence(S[:, :0], T[:, :0]), ValueError, "vocabulary V of at least 1, got 0"),
    (lambda: kl_divergence(S, T.to("meta")), ValueError, "teacher_logits on cpu"),
    (lambda: kl_divergence_(S, T, 1.0), TypeError, "weight to be a tensor, got float"),
    (lambda: kl_divergence_(S, T, W[:2]), ValueError, r"weight of shape \[3\], got \[2\]"),
    (lambda: kl_divergence_(S, T, W.double()), TypeError, "weight of dtype float32"),
    (lambda: kl_divergence_(S, T, torch.ones(6)[::2]), ValueError, "weight to be contiguous"),
    (lambda: kl_divergence_(S, T, W.to("meta")), ValueError, "weight on cpu like student_logits"),
    (lambda: kl_divergence_(S[:1].expand(3, 4), T, W), ValueError, "rows do not overlap"),
    (lambda: kl_divergence_(S.clone().requires_grad_(), T, W), ValueError, "without requires"),
    (lambda: kl_divergence_(S, T, W.clone().requires_grad_()), ValueError, "weight without"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_bad_arguments_name_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()


RAW_CALLS = [
    ((S[0], T, W), r"student_logits of shape \[N, V\], got \[4\]"),
    ((S, T[:2], W), r"teacher_logits of shape \[3, 4\], got \[2, 4\]"),
    ((S[:, :0], T[:, :0], W), "vocabulary V of at least 1"),
    ((S.double(), T, W), "student_logits of dtype"),
    ((S.T.contiguous().T, T, W), "unit stride"),
    ((S[:1].expand(3, 4), T, W), "rows do not overlap"),
    ((S, T, W[:2]), r"weight of shape \[3\], got \[2\]"),
    ((S, T, W.double()), "weight of dtype float32"),
    ((S, T, torch.ones(6)[::2]), "weight to be contiguous"),
]


@pytest.mark.parametrize(("args", "text"), RAW_CALLS)
def test_the_backend_checks_again(args, text):
    with pytest.raises(RuntimeError, match=text):
        torch.ops.gradsafe.kl_divergence_(*args)


def test_values_in_closed_form():
    student = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, -INF]])
    value = kl_divergence(student, teacher)
    expected = [0.75 * math.log(1.5) + 0.25 * math.log(0.5), math.log(4 / 3)]
    assert value.tolist() == pytest.approx(expected, rel=1e-6)

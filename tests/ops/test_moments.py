from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsafe._backend import _C
from gradsafe.ops import AXES, Moments, moments
from gradsafe.ops import _default as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REF_DTYPES = [*DTYPES, torch.float8_e4m3fn]
FIELDS = ("sum", "sum_sq", "dots")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pair(result: Moments | tuple[Moments, Moments]) -> tuple[Moments, ...]:
    return result if isinstance(result, tuple) else (result,)


def fields(result: Moments | tuple[Moments, Moments]) -> list[Tensor]:
    return [t for m in pair(result) for name in ("count", *FIELDS) for t in getattr(m, name)]


def make(shape, k=2, dtype=torch.float32, ref_dtype=None, device="cpu", scale=1.0):
    grad = (torch.randn(shape) * scale).to(device, dtype)
    refs = [torch.randn(shape).to(device, ref_dtype or dtype) for _ in range(k)]
    return grad, refs


def magnitudes(grads, refs, axis):
    """Sums of absolute terms: the natural scale of the rounding error of each result."""
    return pair(
        reference.moments(
            [g.abs() for g in grads], [[r.float().abs() for r in group] for group in refs], axis
        )
    )


def assert_close_to_oracle(result, grads, refs, axis, unsigned, ulps=8.0):
    """Error within a few float32 roundings of the sum of absolute terms, for every slice."""
    expected = pair(reference.moments(grads, refs, axis, unsigned))
    scales = magnitudes(grads, refs, axis)
    for got, want, scale in zip(pair(result), expected, scales, strict=True):
        for a, b in zip(got.count, want.count, strict=True):
            assert torch.equal(a, b)
        for name in FIELDS:
            for a, b, s in zip(
                getattr(got, name), getattr(want, name), getattr(scale, name), strict=True
            ):
                assert a.dtype == torch.float64
                assert a.shape == b.shape
                assert torch.all((a - b).abs() <= ulps * 2.0**-24 * s + 1e-300)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("k", range(5))
def test_equals_the_oracle_for_every_axis_and_reference_count(k, axis, unsigned, device):
    shapes = [(7, 33), (300, 1100), (1, 5), (64, 64)]
    data = [make(shape, k, device=device) for shape in shapes]
    grads, refs = [d[0] for d in data], [d[1] for d in data]
    result = moments(grads, refs, axis, unsigned)
    assert_close_to_oracle(result, grads, refs, axis, unsigned)
    if k == 0:
        assert_close_to_oracle(moments(grads, None, axis), grads, refs, axis, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("dtype", "ref_dtype"), list(itertools.product(DTYPES, REF_DTYPES)))
def test_equals_the_oracle_for_every_dtype(dtype, ref_dtype, axis, device):
    grad, refs = make((270, 1050), 2, dtype, ref_dtype, device)
    assert_close_to_oracle(moments([grad], [refs], axis), [grad], [refs], axis, True)


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_every_float8_number_is_read_exactly(isa, shift):
    codes = torch.cat([torch.zeros(shift), torch.arange(256)]).to(torch.uint8)
    ref = codes.view(torch.float8_e4m3fn)[None]
    dots = moments([torch.ones(ref.shape)], [[ref]], "column").dots[0][0]
    assert torch.equal(dots.nan_to_num(nan=1e9), ref[0].double().nan_to_num(nan=1e9))
    assert int(dots.isnan().sum()) == 2


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype, axis):
    grad, refs = make((37, 1061), 3, dtype)
    assert _C.cpu_isa() == isa
    assert_close_to_oracle(moments([grad], [refs], axis), [grad], [refs], axis, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
def test_error_is_at_most_twice_that_of_plain_pytorch(axis, dtype):
    squared = {name: torch.zeros(2, dtype=torch.float64) for name in FIELDS}
    for _ in range(30):  # a single draw can be exact by luck; compare root mean squares
        grad, refs = make((130, 1500), 1, dtype)
        oracle = pair(reference.moments([grad], [refs], axis))
        plain = pair(reference.moments([grad], [refs], axis, dtype=None))
        ours = pair(moments([grad], [refs], axis))
        for name, (got, eager, want) in itertools.product(
            FIELDS, zip(ours, plain, oracle, strict=True)
        ):
            exact = getattr(want, name)[0]
            squared[name][0] += (getattr(got, name)[0] - exact).square().sum()
            squared[name][1] += (getattr(eager, name)[0].double() - exact).square().sum()
    for ours_sq, eager_sq in squared.values():
        assert ours_sq.sqrt() <= 2 * eager_sq.sqrt()


def test_vector_levels_agree_bit_by_bit():
    if not {"avx2", "avx512"} <= set(_C.cpu_isas()):
        pytest.skip("needs a machine with AVX-512")
    for dtype, axis in itertools.product(DTYPES, AXES):
        grad, refs = make((301, 1101), 2, dtype)
        results = []
        for level in ("avx2", "avx512"):
            _C.set_cpu_isa(level)
            results.append(fields(moments([grad], [refs], axis)))
        _C.set_cpu_isa("auto")
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("axis", AXES)
def test_bitwise_equal_for_any_number_of_threads_and_any_neighbours(axis):
    data = [make(shape) for shape in [(600, 2100), (5, 5), (1030, 64)]]
    grads, refs = [d[0] for d in data], [d[1] for d in data]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(fields(moments(grads, refs, axis)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = fields(moments(grads[1:2], refs[1:2], axis))
    together = fields(moments(grads[1::-1], refs[1::-1], axis))
    count = len(alone) // (2 if axis == "both" else 1) // 4
    assert count == 1
    assert all(torch.equal(a, b) for a, b in zip(alone, together[::2], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("axis", AXES)
def test_gpu_is_deterministic_and_agrees_with_the_cpu(axis):
    grad, refs = make((513, 2049), 2, torch.bfloat16)
    on_gpu = grad.cuda(), [r.cuda() for r in refs]
    first = fields(moments([on_gpu[0]], [on_gpu[1]], axis))
    second = fields(moments([on_gpu[0]], [on_gpu[1]], axis))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    lists = [on_gpu[0]], [on_gpu[1]]
    assert_close_to_oracle(moments(*lists, axis), *lists, axis, True)


SIZES = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 255, 257, 1023, 1024, 1025])


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=6),
    axis=st.sampled_from(AXES),
    k=st.integers(0, 4),
    unsigned=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_odd_and_empty_shapes(shapes, axis, k, unsigned, dtype):
    shapes = [s if s[0] * s[1] <= 300_000 else (s[0] // 4, s[1]) for s in shapes]
    data = [make(shape, k, dtype) for shape in shapes]
    grads, refs = [d[0] for d in data], [d[1] for d in data]
    assert_close_to_oracle(moments(grads, refs, axis, unsigned), grads, refs, axis, unsigned)


def test_long_lists():
    data = [make((3, i % 7 + 1), 1) for i in range(400)]
    grads, refs = [d[0] for d in data], [d[1] for d in data]
    assert_close_to_oracle(moments(grads, refs, "row"), grads, refs, "row", True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_with_row_stride_and_odd_alignment(dtype, axis, device):
    big, big_ref = torch.randn(50, 203).to(device, dtype), torch.randn(49, 300).to(device, dtype)
    grad, ref = big[1:48, 3:190], big_ref[2:49, 101:288]
    assert_close_to_oracle(moments([grad], [[ref]], axis), [grad], [[ref]], axis, True)
    shifted = torch.randn(47 * 187 + 1).to(device, dtype)[1:].view(47, 187)
    assert_close_to_oracle(moments([shifted], [[ref]], axis), [shifted], [[ref]], axis, True)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_around_a_view_is_never_read(device):
    poisoned = torch.full((70, 120), float("nan"), device=device)
    poisoned[2:67, 5:112] = torch.randn(65, 107)
    grad = poisoned[2:67, 5:112]
    for axis in AXES:
        assert all(torch.isfinite(t).all() for t in fields(moments([grad], [[grad]], axis)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_reach_their_slices_and_no_others(bad, device):
    grad, refs = make((40, 50), 1, device=device)
    grad[7, 9] = bad
    rows, columns = moments([grad], [refs], "both")
    for result, index in ((rows, 7), (columns, 9)):
        for name in FIELDS:
            values = getattr(result, name)[0].reshape(-1, len(result.count[0]))
            finite = torch.isfinite(values).all(0)
            assert not finite[index]
            assert finite.sum() == len(finite) - 1
    other, other_refs = make((4, 4), 1, device=device)
    both = moments([grad, other], [refs, other_refs])
    assert not torch.isfinite(both.sum[0])
    assert torch.isfinite(both.sum[1])


def test_extreme_magnitudes():
    huge = torch.full((3, 100), 3e38)
    result = moments([huge], [[torch.ones(3, 100)]])
    assert torch.isinf(result.sum_sq[0])  # a square beyond float32 is reported as infinity
    tiny = torch.full((3, 100), 1e-40)  # subnormal
    assert moments([tiny]).sum[0].item() == pytest.approx(300 * 1e-40, rel=1e-4)
    half = torch.full((16, 4096), 65504.0, dtype=torch.float16)
    assert moments([half]).sum[0].item() == pytest.approx(65504.0 * 16 * 4096, rel=1e-6)


def test_zero_reference_and_constant_gradient():
    grad = torch.full((64, 640), 0.37)
    result = moments([grad], [[torch.zeros(64, 640)]])
    assert result.dots[0].item() == 0.0
    assert result.std()[0].item() == pytest.approx(0.0, abs=1e-3 * 0.37)
    assert moments([torch.zeros(2, 0)]).std()[0].item() == 0.0


def test_std_of_slices():
    grad = torch.randn(40, 500) * torch.logspace(-3, 3, 40)[:, None]
    rows, columns = moments([grad], None, "both")
    assert torch.allclose(rows.std()[0], grad.double().std(1, correction=0), rtol=1e-5)
    assert torch.allclose(columns.std()[0], grad.double().std(0, correction=0), rtol=1e-5)


def test_empty_list():
    assert moments([]) == Moments([], [], [], [])
    assert moments([], [], "both") == (Moments([], [], [], []), Moments([], [], [], []))


def test_opcheck():
    for axis, k in itertools.product(range(4), (0, 2)):
        data = [make((5, 7), k), make((2, 3), k)]
        refs = [r for d in data for r in d[1]]
        args = ([d[0] for d in data], refs, k, axis, True)
        torch.library.opcheck(torch.ops.gradsafe.moments.default, args)


@pytest.mark.parametrize("axis", AXES)
def test_compiles_into_one_graph(axis):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(grads, refs):
        return moments([g * 2 for g in grads], refs, axis)

    data = [make((6, 9)), make((3, 20))]
    grads, refs = [d[0] for d in data], [d[1] for d in data]
    expected = moments([g * 2 for g in grads], refs, axis)
    for a, b in zip(fields(step(grads, refs)), fields(expected), strict=True):
        assert torch.equal(a, b)


def test_meta_tensors_have_the_real_shapes():
    grad, refs = make((6, 9))
    for axis in AXES:
        fake = moments([grad.to("meta")], [[r.to("meta") for r in refs]], axis)
        for a, b in zip(fields(fake), fields(moments([grad], [refs], axis)), strict=True):
            assert a.is_meta
            assert a.shape == b.shape
            assert a.dtype == b.dtype


def test_is_not_differentiable():
    grad, refs = make((3, 4), 1)
    result = moments([grad.requires_grad_()], [refs])
    with pytest.raises(NotImplementedError, match="detach"):
        result.sum[0].backward()


def test_forward_mode_is_refused():
    grad, refs = make((3, 4), 1)
    with pytest.raises(
        NotImplementedError, match=r"moments: expected grads\[0\] without a tangent"
    ):
        torch.func.jvp(lambda g: moments([g], [refs]).sum[0], (grad,), (refs[0],))


G, R = torch.ones(3, 4), torch.ones(3, 4)
BAD_CALLS = [
    (lambda: moments(G), TypeError, "list of tensors, got Tensor"),
    (lambda: moments([G.numpy()]), TypeError, r"grads\[0\] to be a tensor"),
    (lambda: moments([torch.ones(3)]), ValueError, r"grads\[0\] of shape \[O, I\], got \[3\]"),
    (lambda: moments([G.double()]), TypeError, "float32, bfloat16 or float16, got torch.float64"),
    (lambda: moments([G, G.half()]), TypeError, r"grads\[1\] of dtype torch.float32"),
    (lambda: moments([G.T]), ValueError, r"call \.contiguous\(\) first"),
    (lambda: moments([G], [[R], [R]]), ValueError, "one list of references for each of 1"),
    (lambda: moments([G], [[R] * 5]), ValueError, "0 to 4 references"),
    (lambda: moments([G, G], [[R], []]), ValueError, r"refs\[1\] to hold 1 references"),
    (lambda: moments([G], [[R.T.contiguous()]]), ValueError, r"shape \[3, 4\], got \[4, 3\]"),
    (lambda: moments([G, G], [[R], [R.half()]]), TypeError, r"refs\[1\]\[0\] of dtype"),
    (lambda: moments([G], [[R.to("meta")]]), ValueError, r"refs\[0\]\[0\] on cpu"),
    (lambda: moments([G], [[R]], "rows"), ValueError, "expected axis in"),
    (lambda: moments([G], [[R]], ["row"]), ValueError, "expected axis in"),
    (lambda: moments([G], 5), TypeError, "refs to hold one list of .* got int"),
    (lambda: moments([G], [None]), TypeError, r"refs\[0\] to be a list of tensors, got NoneType"),
    (lambda: moments([G], [[R]], unsigned=1), TypeError, "unsigned to be True or False, got 1"),
    (lambda: moments([torch.nested.nested_tensor([R[0], R[0, :2]])]), TypeError, "to be dense"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_bad_arguments_name_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()


RAW_CALLS = [
    (([G], [], 1, 0, True), "num_refs references for each of 1"),
    (([G], [R.T.contiguous()], 1, 0, True), r"refs\[0\]\[0\] of shape \[3, 4\], got \[4, 3\]"),
    (([G.double()], [], 0, 0, True), r"grads\[0\] of dtype"),
    (([G, G.half()], [], 0, 0, True), r"dtype of grads\[0\]"),
    (([G.T], [], 0, 0, True), "unit stride"),
    (([torch.ones(3)], [], 0, 0, True), r"shape \[O, I\], got \[3\]"),
    (([G], [], 0, 9, True), "unknown axis"),
    (([G], [R] * 5, 5, 0, True), "0 to 4 references"),
]


@pytest.mark.parametrize(("args", "text"), RAW_CALLS)
def test_the_backend_checks_again(args, text):
    with pytest.raises(RuntimeError, match=text):
        torch.ops.gradsafe.moments(*args)


def test_the_plan_covers_every_element_once():
    for rows, cols, axis in [(0, 5, 3), (1, 1, 3), (2048, 5632, 3), (2**33, 3, 0), (5, 2**34, 1)]:
        plan = _C.plan_moments(rows, cols, axis, 2)
        assert plan["rows"] * plan["cols"] == rows * cols
        if rows * cols:
            for size, tile, count in [
                (plan["rows"], plan["tile_rows"], plan["row_blocks"]),
                (plan["cols"], plan["tile_cols"], plan["col_strips"]),
            ]:
                assert (count - 1) * tile < size <= count * tile

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsafe._backend import _C
from gradsafe.ops import AXES, Moments, moments, wgrad_moments
from gradsafe.ops import _default as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REF_DTYPES = [*DTYPES, torch.float8_e4m3fn]
FIELDS = ("sum", "sum_sq", "dots")


def pair(result: Moments | tuple[Moments, Moments]) -> tuple[Moments, ...]:
    return result if isinstance(result, tuple) else (result,)


def fields(result):
    return [getattr(m, name) for m in pair(result) for name in ("count", *FIELDS)]


def make(samples, tokens, shape, k=2, dtype=torch.float32, ref_dtype=torch.bfloat16):
    rows, cols = shape
    x, dy = torch.randn(samples, tokens, cols), torch.randn(samples, tokens, rows)
    return x.to(dtype), dy.to(dtype), [torch.randn(shape).to(ref_dtype) for _ in range(k)]


def check(x, dy, refs, axis, unsigned=True, lengths=None):
    """Error of each result against float64, in float32 roundings of what rounds.

    An entry of G is off by at most about sqrt(T) roundings of sum_t |dy||x|; the results are sums
    of entries, of squares 2|g||dg|, and of dots |dg||r|.
    """
    sizes = lengths if lengths is not None else [x.shape[1]] * len(x)
    result = wgrad_moments(x, dy, refs, axis, unsigned, lengths)
    expected = reference.wgrad_moments(x, dy, refs, axis, unsigned, lengths)
    scale = reference.wgrad_moments(
        x.abs(), dy.abs(), [r.float().abs() for r in refs], axis, True, lengths
    )
    ulps = (8 + max(sizes, default=0) ** 0.5) * 2.0**-24
    for got, want, bound in zip(pair(result), pair(expected), pair(scale), strict=True):
        assert torch.equal(got.count, want.count)
        for name in FIELDS:
            a, b, s = getattr(got, name), getattr(want, name), getattr(bound, name)
            assert a.shape == b.shape
            assert a.dtype == torch.float64
            assert torch.all((a - b).abs() <= ulps * s + 1e-300)


@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("k", range(5))
def test_equals_the_oracle_for_every_axis_and_reference_count(k, axis, unsigned):
    check(*make(3, 19, (37, 130), k), axis, unsigned, [19, 1, 7])
    check(*make(2, 5, (400, 530), k), axis, unsigned)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("dtype", "ref_dtype"), list(itertools.product(DTYPES, REF_DTYPES)))
def test_equals_the_oracle_for_every_dtype(dtype, ref_dtype, axis):
    check(*make(2, 33, (70, 65), 2, dtype, ref_dtype), axis, True, [33, 20])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype, axis):
    check(*make(2, 9, (101, 147), 1, dtype), axis)
    assert _C.cpu_isa() == isa


SIZES = st.sampled_from([0, 1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 97, 193, 385, 513])


@settings(max_examples=60, deadline=None)
@given(
    rows=SIZES,
    cols=SIZES,
    tokens=st.integers(0, 40),
    samples=st.integers(0, 4),
    axis=st.sampled_from(AXES),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_odd_and_empty_shapes(rows, cols, tokens, samples, axis, dtype, data):
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=samples, max_size=samples))
    x, dy, refs = make(samples, tokens, (rows, cols), 1, dtype)
    if samples == 0:
        assert all(t.shape[0] == 0 for t in fields(wgrad_moments(x, dy, refs, axis)))
        return
    check(x, dy, refs, axis, True, lengths)


def test_agrees_with_moments_of_the_stored_gradient():
    x, dy, refs = make(4, 30, (300, 700))
    grads = [dy[b].t() @ x[b] for b in range(4)]
    stored = moments(grads, [refs] * 4, "row")
    fused = wgrad_moments(x, dy, refs, "row")
    for b in range(4):
        largest = float(stored.dots[b].abs().max())  # single dots may cancel to almost nothing
        assert torch.allclose(fused.dots[b], stored.dots[b], rtol=0, atol=1e-6 * largest)
    assert torch.allclose(torch.stack(fused.std()), torch.stack(stored.std()), rtol=1e-5)


def test_a_sample_does_not_depend_on_its_batch_or_on_threads():
    x, dy, refs = make(3, 40, (500, 600))
    lengths = [40, 11, 25]
    before = torch.get_num_threads()
    for axis in AXES:
        torch.set_num_threads(2)
        together = fields(wgrad_moments(x, dy, refs, axis, True, lengths))
        torch.set_num_threads(1)
        single = fields(wgrad_moments(x, dy, refs, axis, True, lengths))
        alone = fields(wgrad_moments(x[1:2, :11], dy[1:2, :11], refs, axis))
        torch.set_num_threads(before)
        for a, b, c in zip(together, single, alone, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a[1:2], c)


def test_vector_levels_agree_bit_by_bit():
    if not {"avx2", "avx512"} <= set(_C.cpu_isas()):
        pytest.skip("needs a machine with AVX-512")
    for dtype, axis in itertools.product(DTYPES, AXES):
        x, dy, refs = make(2, 21, (130, 333), 2, dtype)
        results = []
        for level in ("avx2", "avx512"):
            _C.set_cpu_isa(level)
            results.append(fields(wgrad_moments(x, dy, refs, axis)))
        _C.set_cpu_isa("auto")
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("exponent", [0, -40, -52, -56, -60, -64, -100, -126, -130])
def test_pairs_of_bfloat16_are_exact_down_to_subnormal_numbers(exponent):
    """AVX512_BF16 flushes subnormal numbers, AVX2 does not: nothing of that may show."""
    if not {"avx2", "avx512"} <= set(_C.cpu_isas()):
        pytest.skip("needs a machine with AVX-512")
    for tokens in (1, 2, 7):
        x, dy, refs = make(2, tokens, (19, 70), 1, torch.bfloat16)
        x, dy = x * 2.0**exponent, dy * 2.0**exponent
        results = []
        for level in ("avx2", "avx512"):
            _C.set_cpu_isa(level)
            results.append(fields(wgrad_moments(x, dy, [refs[0].float() * 1e30], "both")))
        _C.set_cpu_isa("auto")
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_padding_is_never_read():
    x, dy, refs = make(3, 12, (40, 50))
    lengths = [12, 0, 5]
    expected = fields(wgrad_moments(x, dy, refs, "both", True, lengths))
    for b, length in enumerate(lengths):
        x[b, length:] = float("nan")
        dy[b, length:] = float("inf")
    got = fields(wgrad_moments(x, dy, refs, "both", True, lengths))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_tokens_without_output_gradient_are_skipped_but_their_nan_is_not():
    x, dy, refs = make(2, 10, (30, 40))
    dy[:, :9] = 0
    check(x, dy, refs, "both")
    x[1, 3, 7] = float("nan")
    rows, columns = wgrad_moments(x, dy, refs, "both")
    assert torch.isfinite(rows.sum[0]).all()
    assert torch.isnan(rows.sum[1]).all()  # 0 * NaN in column 7 of every row
    assert torch.isnan(columns.sum[1]).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_reach_their_slices_and_no_others(bad):
    x, dy, refs = make(2, 10, (30, 40))
    dy[0, 4, 11] = bad
    rows, _ = wgrad_moments(x, dy, refs, "both")
    finite = torch.isfinite(rows.sum_sq)
    assert finite[1].all()
    assert (~finite[0]).nonzero().flatten().tolist() == [11]
    clean_x, clean_dy, clean_refs = make(1, 3, (20, 20))
    clean_refs[0][3, 5] = bad
    rows, columns = wgrad_moments(clean_x, clean_dy, clean_refs, "both")
    assert (~torch.isfinite(rows.dots[0, 0])).nonzero().flatten().tolist() == [3]
    assert torch.isfinite(rows.dots[0, 1]).all()
    assert (~torch.isfinite(columns.dots[0, 0])).nonzero().flatten().tolist() == [5]


def test_no_buffer_of_the_size_of_a_gradient(monkeypatch):
    """Allocations of torch during the call, for a gradient of a million entries."""
    x, dy, refs = make(4, 8, (1000, 1000))
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        wgrad_moments(x, dy, refs)
    largest = max(event.cpu_memory_usage for event in record.events())
    assert 0 < largest < 1000 * 1000


def test_views_of_longer_buffers():
    base_x, base_dy = torch.randn(2, 9, 80), torch.randn(2, 9, 70)
    refs = [torch.randn(90, 100)[3:53, 7:67]]
    check(base_x[..., 10:70], base_dy[..., 5:55], refs, "both")


def test_opcheck():
    for axis, k in itertools.product(range(4), (0, 2)):
        x, dy, refs = make(2, 3, (5, 7), k)
        torch.library.opcheck(
            torch.ops.gradsafe.wgrad_moments.default, (x, dy, refs, [3, 1], axis, True)
        )


@pytest.mark.parametrize("axis", AXES)
def test_compiles_into_one_graph(axis):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, dy, refs):
        return wgrad_moments(x * 2, dy, refs, axis, lengths=[4, 2])

    x, dy, refs = make(2, 4, (6, 9))
    expected = wgrad_moments(x * 2, dy, refs, axis, lengths=[4, 2])
    for a, b in zip(fields(step(x, dy, refs)), fields(expected), strict=True):
        assert torch.equal(a, b)


def test_is_not_differentiable():
    x, dy, refs = make(1, 2, (3, 4))
    result = wgrad_moments(x.requires_grad_(), dy, refs)
    with pytest.raises(NotImplementedError, match="detach"):
        result.sum.sum().backward()


X, DY, R = torch.ones(2, 3, 5), torch.ones(2, 3, 4), torch.ones(4, 5)
BAD_CALLS = [
    (lambda: wgrad_moments(X[0], DY, [R]), ValueError, r"x of shape \[B, T, I\], got \[3, 5\]"),
    (lambda: wgrad_moments(X, DY[:1], [R]), ValueError, r"\[B, T\] = \[2, 3\] like x"),
    (lambda: wgrad_moments(X, DY.half(), [R]), TypeError, "dy of dtype torch.float32"),
    (lambda: wgrad_moments(X.double(), DY, [R]), TypeError, "float32, bfloat16 or float16"),
    (lambda: wgrad_moments(X, DY, [R.T]), ValueError, r"refs\[0\] of shape \[O, I\] = \[4, 5\]"),
    (lambda: wgrad_moments(X, DY, [R] * 5), ValueError, "0 to 4 references, got 5"),
    (lambda: wgrad_moments(X, DY, R), TypeError, "list of tensors"),
    (lambda: wgrad_moments(X, DY, [R, R.half()]), TypeError, r"refs\[1\] of dtype"),
    (lambda: wgrad_moments(X, DY, [R], lengths=[3]), ValueError, "one length for each of 2"),
    (lambda: wgrad_moments(X, DY, [R], lengths=[3, 4]), ValueError, r"lengths\[1\] between 0 and"),
    (lambda: wgrad_moments(X, DY, [R], lengths=torch.ones(2)), TypeError, "tolist"),
    (lambda: wgrad_moments(X, DY, [R], "cell"), ValueError, "expected axis in"),
    (lambda: wgrad_moments(X.transpose(1, 2), DY, [R]), ValueError, "contiguous|like x"),
    (lambda: wgrad_moments(X, DY, 5), TypeError, "refs to be a list of tensors, got int"),
    (lambda: wgrad_moments(X, DY, [R], lengths=3), TypeError, "lengths to be a list of ints"),
    (lambda: wgrad_moments(X, DY, lengths=[3, 2.0]), TypeError, r"lengths\[1\] to be an int"),
    (lambda: wgrad_moments(X, DY, lengths=[3, True]), TypeError, r"lengths\[1\] to be an int"),
    (lambda: wgrad_moments(X, DY, [R], unsigned=None), TypeError, "unsigned to be True or False"),
    (lambda: wgrad_moments("x", DY, [R]), TypeError, "x to be a tensor"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_bad_arguments_name_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()


RAW_CALLS = [
    ((X[0], DY, [R], [], 0, True), r"x of shape \[B, T, I\]"),
    ((X, DY[:1], [R], [], 0, True), r"dy of shape \[B, T, O\]"),
    ((X, DY, [R[:2]], [], 0, True), r"refs\[0\] of shape \[4, 5\], got \[2, 5\]"),
    ((X, DY, [R], [1], 0, True), "one length for each"),
    ((X, DY, [R], [1, 9], 0, True), r"lengths\[1\] between"),
    ((X, DY.half(), [R], [], 0, True), "dtype of x"),
    ((X, DY, [R], [], 4, True), "unknown axis"),
]


@pytest.mark.parametrize(("args", "text"), RAW_CALLS)
def test_the_backend_checks_again(args, text):
    with pytest.raises(RuntimeError, match=text):
        torch.ops.gradsafe.wgrad_moments(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_of_large_entries_are_summed_as_exactly_as_eager(dtype):
    """Row sums over 4,097 columns of entries around 100, root mean square of the error."""
    torch.manual_seed(0)
    x, dy = (torch.randn(1, 40, size).mul_(30).add_(100).to(dtype) for size in (4097, 64))
    exact = (dy[0].double().t() @ x[0].double()).sum(1)
    eager = (dy[0].float().t() @ x[0].float()).sum(1)
    ours = wgrad_moments(x, dy, [], "row").sum[0]
    rms = [float((found.double() - exact).square().mean().sqrt()) for found in (ours, eager)]
    assert rms[0] <= 2 * rms[1]

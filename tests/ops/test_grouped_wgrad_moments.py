from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsafe._backend import _C
from gradsafe.ops import AXES, Moments, grouped_wgrad_moments, wgrad_moments
from gradsafe.ops import _default as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REF_DTYPES = [*DTYPES, torch.float8_e4m3fn]
FIELDS = ("count", "sum", "sum_sq", "dots")

LENGTHS = [3, 0, 9, 1, 17, 2, 4]
EXPERTS = [4, 0, 0, 2, 4, 4, 0]  # 1 and 3 have no segment


def pair(result: Moments | tuple[Moments, Moments]) -> tuple[Moments, ...]:
    return result if isinstance(result, tuple) else (result,)


def fields(result):
    return [getattr(m, name) for m in pair(result) for name in FIELDS]


def make(rows, shape, k=2, dtype=torch.float32, ref_dtype=torch.bfloat16, experts=5):
    outs, ins = shape
    x, dy = torch.randn(rows, ins).to(dtype), torch.randn(rows, outs).to(dtype)
    return x, dy, [torch.randn(experts, outs, ins).to(ref_dtype) for _ in range(k)]


def check(x, dy, refs, lengths=LENGTHS, experts=EXPERTS, axis="tensor", unsigned=True):
    """Within 1e-5 of the float64 oracle, relative to the sum of the terms' absolute values."""
    result = grouped_wgrad_moments(x, dy, refs, lengths, experts, axis, unsigned)
    expected = reference.grouped_wgrad_moments(x, dy, refs, lengths, experts, axis, unsigned)
    scale = reference.grouped_wgrad_moments(
        x.abs(), dy.abs(), [r.float().abs() for r in refs], lengths, experts, axis
    )
    for got, want, bound in zip(fields(result), fields(expected), fields(scale), strict=True):
        assert got.shape == want.shape
        assert got.dtype == torch.float64
        assert torch.all((got - want).abs() <= 1e-5 * bound)


def alone(x, dy, refs, lengths, experts, axis, unsigned=True):
    """`wgrad_moments` of one segment after the other, stacked."""
    results = []
    for x_s, dy_s, expert in zip(x.split(lengths), dy.split(lengths), experts, strict=True):
        own = [ref[expert] for ref in refs]
        results.append(fields(wgrad_moments(x_s[None], dy_s[None], own, axis, unsigned)))
    return [torch.cat(field) for field in zip(*results, strict=True)]


@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("k", range(5))
def test_equals_the_oracle_for_every_axis_and_reference_count(k, axis, unsigned):
    check(*make(36, (37, 130), k), LENGTHS, EXPERTS, axis, unsigned)
    check(*make(36, (400, 530), k), LENGTHS, EXPERTS, axis, unsigned)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("dtype", "ref_dtype"), list(itertools.product(DTYPES, REF_DTYPES)))
def test_equals_the_oracle_for_every_dtype(dtype, ref_dtype, axis):
    check(*make(36, (70, 65), 2, dtype, ref_dtype), axis=axis)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype, axis):
    check(*make(36, (101, 147), 1, dtype), axis=axis)
    assert _C.cpu_isa() == isa


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_segment_equals_wgrad_moments_alone_bit_by_bit(isa, dtype, axis):
    lengths = [*range(18), 40]
    x, dy, refs = make(sum(lengths), (130, 530), 2, dtype)
    experts = [(3 * s) % 5 for s in range(len(lengths))]
    got = fields(grouped_wgrad_moments(x, dy, refs, lengths, experts, axis))
    wanted = alone(x, dy, refs, lengths, experts, axis)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_and_panels_give_the_same_bits(isa, dtype, axis):
    """Zero rows of x add nothing, but make a segment too long for the way of few tokens."""
    lengths = [1, 2, 5, 12]
    x, dy, refs = make(20, (101, 530), 2, dtype)
    few = fields(grouped_wgrad_moments(x, dy, refs, lengths, [0, 1, 2, 3], axis))
    longer_x = [torch.cat([s, torch.zeros(20, 530, dtype=dtype)]) for s in x.split(lengths)]
    longer_dy = [torch.cat([s, torch.ones(20, 101, dtype=dtype)]) for s in dy.split(lengths)]
    more = [length + 20 for length in lengths]
    panels = grouped_wgrad_moments(
        torch.cat(longer_x), torch.cat(longer_dy), refs, more, [0, 1, 2, 3], axis
    )
    assert all(torch.equal(a, b) for a, b in zip(few, fields(panels), strict=True))


SIZES = st.sampled_from([0, 1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 97, 193, 385, 513])


@settings(max_examples=60, deadline=None)
@given(
    rows=SIZES,
    cols=SIZES,
    segments=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), max_size=6),
    axis=st.sampled_from(AXES),
    dtype=st.sampled_from(DTYPES),
)
def test_odd_and_empty_shapes(rows, cols, segments, axis, dtype):
    lengths, experts = [s[0] for s in segments], [s[1] for s in segments]
    x, dy, refs = make(sum(lengths), (rows, cols), 1, dtype, experts=3)
    if not segments:
        result = fields(grouped_wgrad_moments(x, dy, refs, [], [], axis))
        assert all(t.shape[0] == 0 for t in result)
        return
    check(x, dy, refs, lengths, experts, axis)


def test_no_experts_no_segments():
    x, dy, refs = make(0, (3, 4), experts=0)
    result = grouped_wgrad_moments(x, dy, refs, [], [], "row")
    assert result.sum.shape == (0, 3)
    assert result.dots.shape == (0, 2, 3)


def test_a_segment_without_rows_has_its_count_and_zeros():
    x, dy, refs = make(4, (3, 5))
    rows, columns = grouped_wgrad_moments(x, dy, refs, [0, 4, 0], [1, 0, 1], "both")
    for part, count in ((rows, 5), (columns, 3)):
        assert (part.count[0] == count).all()
        assert not part.sum[0].any()
        assert not part.sum_sq[2].any()
        assert not part.dots[[0, 2]].any()


def test_experts_without_a_segment_are_never_read():
    x, dy, refs = make(36, (40, 50))
    expected = fields(grouped_wgrad_moments(x, dy, refs, LENGTHS, EXPERTS, "both"))
    for ref in refs:
        ref[[1, 3]] = float("nan")
    got = fields(grouped_wgrad_moments(x, dy, refs, LENGTHS, EXPERTS, "both"))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("axis", AXES)
def test_results_depend_neither_on_threads_nor_on_the_order_of_segments(axis):
    x, dy, refs = make(36, (500, 600))
    before = torch.get_num_threads()
    results = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        results.append(fields(grouped_wgrad_moments(x, dy, refs, LENGTHS, EXPERTS, axis)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    order = [5, 2, 6, 0, 1, 4, 3]
    xs, dys = x.split(LENGTHS), dy.split(LENGTHS)
    moved = grouped_wgrad_moments(
        torch.cat([xs[s] for s in order]),
        torch.cat([dys[s] for s in order]),
        refs,
        [LENGTHS[s] for s in order],
        [EXPERTS[s] for s in order],
        axis,
    )
    for a, b in zip(fields(moved), results[0], strict=True):
        assert torch.equal(a, b[order])


def test_vector_levels_agree_bit_by_bit():
    if not {"avx2", "avx512"} <= set(_C.cpu_isas()):
        pytest.skip("needs a machine with AVX-512")
    for dtype, axis in itertools.product(DTYPES, AXES):
        x, dy, refs = make(36, (130, 333), 2, dtype)
        results = []
        for level in ("avx2", "avx512"):
            _C.set_cpu_isa(level)
            results.append(fields(grouped_wgrad_moments(x, dy, refs, LENGTHS, EXPERTS, axis)))
        _C.set_cpu_isa("auto")
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_segment_and_slice(bad):
    x, dy, refs = make(36, (30, 40))
    dy[5, 11] = bad  # segment 2
    rows, _ = grouped_wgrad_moments(x, dy, refs, LENGTHS, EXPERTS, "both")
    assert (~torch.isfinite(rows.sum_sq)).nonzero().tolist() == [[2, 11]]
    x, dy, refs = make(36, (30, 40))
    refs[1][4, 3, 5] = bad
    rows, columns = grouped_wgrad_moments(x, dy, refs, LENGTHS, EXPERTS, "both")
    hit = [s for s, expert in enumerate(EXPERTS) if expert == 4]
    assert (~torch.isfinite(rows.dots)).nonzero().tolist() == [[s, 1, 3] for s in hit]
    assert (~torch.isfinite(columns.dots)).nonzero().tolist() == [[s, 1, 5] for s in hit]


def test_no_buffer_of_the_size_of_a_gradient_or_a_reference():
    """Allocations of torch during the call, for gradients of a million entries."""
    x, dy, refs = make(36, (1000, 1000))
    from torch.profiler import ProfilerActivity, profile

    for axis in AXES:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            grouped_wgrad_moments(x, dy, refs, LENGTHS, EXPERTS, axis)
        largest = max(event.cpu_memory_usage for event in record.events())
        assert 0 < largest < 2 * 1000 * 1000


def test_strided_operands_and_references():
    base_x, base_dy = torch.randn(36, 80), torch.randn(36, 70)
    refs = [torch.randn(10, 90, 100)[::2, 3:53, 7:67]]
    check(base_x[:, 10:70], base_dy[:, 5:55], refs, axis="both")


def test_more_groups_than_the_workspace_holds_at_a_time():
    """The partial sums of 170 segments exceed the workspace of the CPU kernel."""
    lengths, experts = [1, 2] * 85, [(7 * s) % 20 for s in range(170)]
    x, dy, _ = make(sum(lengths), (6000, 700))
    refs = [torch.randn(6020, 700).bfloat16().as_strided((20, 6000, 700), (700, 700, 1))]
    whole = fields(grouped_wgrad_moments(x, dy, refs, lengths, experts, "both"))
    for first in (0, 82, 168):
        rows = slice(3 * first // 2, 3 * first // 2 + 3)
        two = slice(first, first + 2)
        part = grouped_wgrad_moments(x[rows], dy[rows], refs, [1, 2], experts[two], "both")
        assert all(torch.equal(a[two], b) for a, b in zip(whole, fields(part), strict=True))


def test_opcheck():
    for axis, k in itertools.product(range(4), (0, 2)):
        x, dy, refs = make(4, (5, 7), k)
        torch.library.opcheck(
            torch.ops.gradsafe.grouped_wgrad_moments.default,
            (x, dy, refs, [3, 1, 0], [4, 0, 4], axis, True),
        )


@pytest.mark.parametrize("axis", AXES)
def test_compiles_into_one_graph(axis):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, dy, refs):
        return grouped_wgrad_moments(x * 2, dy, refs, [4, 2], [3, 1], axis)

    x, dy, refs = make(6, (6, 9))
    expected = grouped_wgrad_moments(x * 2, dy, refs, [4, 2], [3, 1], axis)
    for a, b in zip(fields(step(x, dy, refs)), fields(expected), strict=True):
        assert torch.equal(a, b)


def test_is_not_differentiable():
    x, dy, refs = make(2, (3, 4))
    result = grouped_wgrad_moments(x.requires_grad_(), dy, refs, [2], [0])
    with pytest.raises(NotImplementedError, match="detach"):
        result.sum.sum().backward()


X, DY, R = torch.ones(3, 5), torch.ones(3, 4), torch.ones(2, 4, 5)
op = grouped_wgrad_moments
BAD_CALLS = [
    (lambda: op(X[None], DY, [R], [3], [0]), ValueError, r"x of shape \[N, I\], got \[1, 3, 5\]"),
    (lambda: op(X, DY[:2], [R], [3], [0]), ValueError, r"dy of shape \[N, O\] with \[N\] = \[3\]"),
    (lambda: op(X, DY.half(), [R], [3], [0]), TypeError, "dy of dtype torch.float32"),
    (lambda: op(X, DY, [R[0]], [3], [0]), ValueError, r"refs\[0\] of shape \[E, O, I\]"),
    (lambda: op(X, DY, [R, R[:1]], [3], [0]), ValueError, r"refs\[1\] of shape \[E, O, I\]"),
    (lambda: op(X, DY, [R.mT.contiguous()], [3], [0]), ValueError, r"\[2, 4, 5\], got \[2, 5, 4\]"),
    (lambda: op(X, DY, [R.mT.contiguous().mT], [3], [0]), ValueError, "unit stride"),
    (lambda: op(X, DY, R, [3], [0]), TypeError, "list of tensors"),
    (lambda: op(X, DY, [R, R.half()], [3], [0]), TypeError, r"refs\[1\] of dtype"),
    (lambda: op(X, DY, [R] * 5, [3], [0]), ValueError, "0 to 4 references, got 5"),
    (lambda: op(X, DY, [R], [1, 1], [0, 1]), ValueError, "add up to N = 3, got 2"),
    (lambda: op(X, DY, [R], [4, -1], [0, 1]), ValueError, r"lengths\[1\] of at least 0, got -1"),
    (lambda: op(X, DY, [R], [3], [0, 1]), ValueError, "one expert for each of 1 segments, got 2"),
    (lambda: op(X, DY, [R], [2, 1], [0, 2]), ValueError, r"experts\[1\] below E = 2"),
    (lambda: op(X, DY, [R], [2, 1], [-1, 0]), ValueError, r"experts\[0\] below E = 2"),
    (lambda: op(X, DY, [], [3], [-1]), ValueError, r"experts\[0\] at least 0"),
    (lambda: op(X, DY, [R], torch.tensor([3]), [0]), TypeError, "pass lengths.tolist()"),
    (lambda: op(X, DY, [R], [3], torch.tensor([0])), TypeError, "pass experts.tolist()"),
    (lambda: op(X, DY, [R], [3], [0], "cell"), ValueError, "expected axis in"),
    (lambda: op(X.mT.contiguous().mT, DY, [R], [3], [0]), ValueError, "contiguous"),
    (lambda: op("x", DY, [R], [3], [0]), TypeError, "x to be a tensor"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_bad_arguments_name_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()


RAW_CALLS = [
    ((X[None], DY, [R], [3], [0], 0, True), r"x of shape \[N, I\]"),
    ((X, DY[:1], [R], [3], [0], 0, True), r"dy of shape \[N, O\]"),
    ((X, DY, [R[0]], [3], [0], 0, True), r"refs\[0\] of shape \[E, O, I\]"),
    ((X, DY, [R[:, :2]], [3], [0], 0, True), r"refs\[0\] of shape \[2, 4, 5\], got \[2, 2, 5\]"),
    ((X, DY, [R], [2], [0], 0, True), "add up to N = 3, got 2"),
    ((X, DY, [R], [2, 2], [0, 0], 0, True), r"lengths\[1\] between 0 and the 1 rows"),
    ((X, DY, [R], [-1, 4], [0, 0], 0, True), r"lengths\[0\] between"),
    ((X, DY, [R], [3], [2], 0, True), r"experts\[0\] between 0 and 1, got 2"),
    ((X, DY, [R], [3], [], 0, True), "one expert for each"),
    ((X, DY.half(), [R], [3], [0], 0, True), "dtype of x"),
    ((X, DY, [R], [3], [0], 4, True), "unknown axis"),
]


@pytest.mark.parametrize(("args", "text"), RAW_CALLS)
def test_the_backend_checks_again(args, text):
    with pytest.raises(RuntimeError, match=text):
        torch.ops.gradsafe.grouped_wgrad_moments(*args)

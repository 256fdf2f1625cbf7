from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from gradsafe._backend import _C
from gradsafe.ops import TopK, cosine_topk, merge_topk
from gradsafe.ops import _default as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = 2.0**-24


def make(queries, rows, features, dtype=torch.float32, row_dtype=None):
    q, r = torch.randn(queries, features), torch.randn(rows, features)
    return q.to(dtype), r.to(row_dtype or dtype)


def cosines(queries, rows):
    """All similarities in float64, and the scale of the rounding error of each."""
    q, r = queries.double(), rows.double()
    norms = q.norm(dim=1)[:, None] * r.norm(dim=1)
    norms = torch.where(norms == 0, torch.ones_like(norms), norms)
    return q @ r.T / norms, q.abs() @ r.abs().T / norms


def check(queries, rows, k, start=0):
    """Each score is the cosine of its row, and each place holds the score that belongs there.

    A chain of at most 256 products is off by about the root of their number; the k-th largest of
    values that are off by at most e is off by at most e.
    """
    found = cosine_topk(queries, rows, k, start)
    assert found.scores.dtype == torch.float32
    assert found.indices.dtype == torch.int64
    assert found.scores.shape == found.indices.shape == (len(queries), k)
    exact, scale = cosines(queries, rows)
    bound = (4 + min(queries.shape[1], 256) ** 0.5) * UNIT * scale + UNIT
    places = found.indices - start
    own, own_bound = exact.gather(1, places), bound.gather(1, places)
    assert torch.all((found.scores - own).abs() <= own_bound)
    want = reference.cosine_topk(queries, rows, k, start).scores
    worst = bound.amax(1, keepdim=True) if len(rows) else 0
    assert torch.all((found.scores - want).abs() <= worst)
    assert torch.all(found.scores[:, :-1] >= found.scores[:, 1:])
    assert all(len(set(row)) == k for row in found.indices.tolist())
    return found


def palette(rows, features, colours=7):
    """Rows that repeat, and which of `colours` each is: cosines are far apart or exactly equal."""
    which = torch.randint(colours, (rows,))
    return torch.randn(colours, features)[which], which


@pytest.mark.parametrize(("dtype", "row_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_equals_the_oracle_for_every_dtype(dtype, row_dtype):
    check(*make(13, 211, 70, dtype, row_dtype), 20, start=5)
    check(*make(70, 50, 600, dtype, row_dtype), 50)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    check(*make(67, 103, 301, dtype), 11)
    assert _C.cpu_isa() == isa


SIZES = st.sampled_from([0, 1, 2, 5, 6, 7, 15, 16, 17, 47, 48, 49, 63, 64, 65, 97, 129, 257])


@settings(max_examples=80, deadline=None)
@given(queries=SIZES, rows=SIZES, features=SIZES, dtype=st.sampled_from(DTYPES), data=st.data())
def test_odd_and_empty_shapes(queries, rows, features, dtype, data):
    k = data.draw(st.integers(0, rows))
    q, r = make(queries, rows, features, dtype)
    check(q, r, k)


@pytest.mark.parametrize("k", [1, 3, 40, 200])
def test_equal_scores_are_ordered_by_index(isa, k):
    queries, (rows, which) = torch.randn(9, 33), palette(200, 33)
    rows[which == 3] = 0
    of_colours = torch.stack([rows[which == c][0] for c in range(7)])
    exact = cosines(queries, of_colours)[0][:, which]  # a matrix product may not repeat its bits
    want = exact.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(check(queries, rows, k).indices, want)


def test_repeated_rows_that_get_better_and_better():
    """Every row enters the list of every query, and pushes another one out."""
    queries = torch.tensor([[1.0, 0.0]])
    angles = torch.linspace(3, 0.1, 500)
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    assert check(queries, rows, 30).indices[0].tolist() == list(range(499, 469, -1))
    assert check(queries, -rows, 30).indices[0].tolist() == list(range(30))


def test_a_vector_is_most_similar_to_itself_and_never_past_one():
    rows = torch.randn(400, 777)
    found = check(rows, rows, 1)
    assert torch.equal(found.indices[:, 0], torch.arange(400))
    assert torch.all(found.scores <= 1)
    assert torch.all(cosine_topk(-rows[:50], rows, 400).scores >= -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors_have_cosine_zero(dtype):
    queries, rows = make(3, 6, 20, dtype)
    queries[1] = 0
    rows[2] = rows[4] = 0
    found = check(queries, rows, 6)
    assert found.scores[1].tolist() == [0.0] * 6
    assert found.indices[1].tolist() == list(range(6))
    assert not torch.signbit(found.scores[1]).any()
    assert {2, 4} == set(found.indices[0][found.scores[0] == 0].tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_vectors_come_first_and_hide_nothing(isa, dtype, bad):
    queries, rows = make(4, 90, 35, dtype)
    rows[61, 34] = rows[17, 0] = bad
    rows[5] = 0
    queries[3] = 0
    found = cosine_topk(queries, rows, 4)
    assert torch.equal(found.indices[:, :2], torch.tensor([[17, 61]] * 4))
    assert found.scores[:, :2].isnan().all()
    assert found.scores[:, 2:].isfinite().all()
    clean = torch.cat([rows[:17], rows[18:61], rows[62:]])
    assert torch.equal(found.scores[:, 2:], cosine_topk(queries, clean, 2).scores)
    want = reference.cosine_topk(queries, rows, 4)
    assert torch.equal(found.indices, want.indices)
    queries[2, 7] = bad
    again = cosine_topk(queries, rows, 4)
    assert again.scores[2].isnan().all()
    assert again.indices[2].tolist() == [0, 1, 2, 3]
    others = [0, 1, 3]
    assert torch.equal(again.scores[others, 2:], found.scores[others, 2:])


def test_more_damaged_rows_than_places():
    queries, rows = make(2, 30, 8)
    rows[10:20, 3] = float("nan")
    assert cosine_topk(queries, rows, 4).indices.tolist() == [[10, 11, 12, 13]] * 2


@pytest.mark.parametrize("exponent", [-133, -126, -100, -33, 33, 60, 100, 124])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_length_of_a_vector_does_not_matter(isa, dtype, exponent):
    queries, rows = make(3, 20, 40, dtype)
    # Few bits, so that even subnormal multiples of 2^-133 are exact.
    rows = (rows.float() * 4).round().clamp(-7, 7)
    expected = cosine_topk(queries, rows.to(dtype), 20)
    scaled = (rows.double() * 2.0**exponent).to(dtype)
    assert torch.equal(scaled.double(), rows.double() * 2.0**exponent)
    assert all(
        torch.equal(a, b) for a, b in zip(cosine_topk(queries, scaled, 20), expected, strict=True)
    )
    by_query = cosine_topk(scaled, queries, 3).scores
    assert torch.equal(by_query, cosine_topk(rows.to(dtype), queries, 3).scores)


@pytest.mark.parametrize("shards", [[300], [1, 299], [100, 100, 100], [7, 0, 48, 2, 243]])
def test_shards_give_the_bits_of_the_whole(shards):
    queries, rows = torch.randn(11, 130), palette(300, 130, 60)[0]
    rows[[4, 250]] = float("nan")
    rows[[9, 120]] = 0
    k = 20
    whole = cosine_topk(queries, rows, k)
    found, start, parts = None, 0, []
    for size in shards:
        shard = rows[start : start + size]
        found = cosine_topk(queries, shard, min(k, start + size), start, found)
        parts.append(cosine_topk(queries, shard, min(k, size), start))
        start += size
    for result in (found, merge_topk(parts, k), merge_topk(parts[::-1], k)):
        assert torch.equal(result.indices, whole.indices)
        assert torch.equal(result.scores.nan_to_num(9), whole.scores.nan_to_num(9))


def test_indices_past_32_bits():
    queries, rows = make(2, 9, 5)
    start = 2**40 + 3
    found = cosine_topk(queries, rows, 9, start)
    assert torch.equal(found.indices - start, cosine_topk(queries, rows, 9).indices)


def test_a_memory_mapped_file(tmp_path):
    queries, rows = make(3, 500, 64, torch.bfloat16)
    path = tmp_path / "rows"
    path.write_bytes(rows.view(torch.uint8).numpy().tobytes())
    mapped = torch.from_file(str(path), size=rows.numel(), dtype=torch.bfloat16).view(500, 64)
    for a, b in zip(cosine_topk(queries, mapped, 7), cosine_topk(queries, rows, 7), strict=True):
        assert torch.equal(a, b)


def test_any_number_of_threads_and_queries_gives_the_same_bits():
    queries, rows = make(1100, 700, 65)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cosine_topk(queries, rows, 30))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    some = [0, 63, 64, 1023, 1024, 1099]
    for index in some:
        alone = cosine_topk(queries[index : index + 1], rows, 30)
        assert torch.equal(alone.scores[0], results[0].scores[index])
        assert torch.equal(alone.indices[0], results[0].indices[index])


def test_vector_levels_agree_bit_by_bit():
    if not {"avx2", "avx512"} <= set(_C.cpu_isas()):
        pytest.skip("needs a machine with AVX-512")
    for count, dtype, row_dtype in itertools.product((1, 2, 3, 4, 70), DTYPES, DTYPES):
        queries, rows = make(count, 333, 531, dtype, row_dtype)
        rows[200] = 0
        results = []
        for level in ("avx2", "avx512"):
            _C.set_cpu_isa(level)
            results.append(cosine_topk(queries, rows, 333))
        _C.set_cpu_isa("auto")
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def at_every_vector_level(queries, rows, k):
    """The result, which AVX2 and AVX-512 must agree on; NaN counts as equal to NaN."""
    if not {"avx2", "avx512"} <= set(_C.cpu_isas()):
        pytest.skip("needs a machine with AVX-512")
    results = []
    try:
        for level in ("avx2", "avx512"):
            _C.set_cpu_isa(level)
            results.append(cosine_topk(queries, rows, k))
    finally:
        _C.set_cpu_isa("auto")
    assert torch.equal(results[0].indices, results[1].indices)
    assert torch.equal(results[0].scores.nan_to_num(9), results[1].scores.nan_to_num(9))
    return results[1]


@pytest.mark.parametrize("features", [1, 2, 15, 31, 32, 33, 255, 256, 257, 511, 513, 1027])
@pytest.mark.parametrize("count", [1, 4, 5, 16, 17, 64, 65, 130])
def test_pairs_of_bfloat16_have_the_bits_of_single_products(count, features):
    queries, rows = make(count, 101, features, torch.bfloat16)
    rows[7] = 0
    queries[count // 2] = 0
    at_every_vector_level(queries, rows, 101)


@pytest.mark.parametrize("exponent", [-20, -55, -56, -57, -62, -63, -64, -70, -110, -127, -133])
@pytest.mark.parametrize("count", [5, 70])
def test_pairs_of_bfloat16_flush_no_subnormal_number(count, exponent):
    """AVX512_BF16 flushes subnormal numbers: where one could occur, it may not serve.

    Small numbers meet only each other, so that nothing larger hides their products.
    """
    queries, rows = make(count, 150, 33, torch.bfloat16)
    queries[-1, :16] = rows[100, :16] = 0
    queries[-1, 20:] = rows[100, 20:] = 0
    tiny = torch.tensor([1.0, -1.5, 1.25, 1.0]) * 2.0**exponent
    queries[-1, 16:20] = tiny.to(torch.bfloat16)
    rows[100, 16:20] = tiny.to(torch.bfloat16)
    queries[-1, 0] = rows[100, 1] = 1  # no scale
    queries[0, 3] = rows[120, 4] = 2.0**exponent  # below much larger ones
    at_every_vector_level(queries, rows, 150)
    # The same products alone decide these scores: a flushed one would be 0.
    found = at_every_vector_level(queries[-1:].expand(count, 33), rows[100:101], 1)
    exact = cosines(queries[-1:], rows[100:101])[0]
    assert torch.equal(found.scores, exact.float().expand(count, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("count", [5, 70])
def test_damaged_bfloat16_vectors_leave_the_pairs_of_others_alone(count, bad):
    queries, rows = make(count, 150, 77, torch.bfloat16)
    clean = at_every_vector_level(queries, rows, 150)
    rows[60, 76] = bad
    found = at_every_vector_level(queries, rows, 150)
    assert torch.equal(found.indices[:, 0], torch.full((count,), 60))
    assert found.scores[:, 0].isnan().all()
    others = clean.indices != 60
    assert torch.equal(found.scores[:, 1:].flatten(), clean.scores[others])
    assert torch.equal(found.indices[:, 1:].flatten(), clean.indices[others])
    queries[2, 5] = bad
    again = at_every_vector_level(queries, rows, 150)
    assert again.scores[2].isnan().all()
    assert torch.equal(again.scores[[0, 1, 3, 4], 1:], found.scores[[0, 1, 3, 4], 1:])


def test_pairs_of_bfloat16_do_not_depend_on_threads_or_company():
    queries, rows = make(70, 400, 131, torch.bfloat16)
    rows[130] *= 2.0**-60  # this block needs a scale, and so takes single products
    whole = at_every_vector_level(queries, rows, 400)
    for some in (slice(0, 1), slice(3, 8), slice(60, 70)):
        part = at_every_vector_level(queries[some], rows, 400)
        assert all(torch.equal(a[some], b) for a, b in zip(whole, part, strict=True))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = cosine_topk(queries, rows, 400)
            assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype):
    queries, rows = make(40, 300, 2048, dtype)
    found = cosine_topk(queries, rows, 300)
    exact, _ = cosines(queries, rows)
    ours = (found.scores - exact.gather(1, found.indices)).abs()
    normalize = torch.nn.functional.normalize
    plain = (normalize(queries, dim=1) @ normalize(rows, dim=1).T - exact).abs()
    assert ours.max() <= 2 * plain.max()
    assert ours.mean() <= 2 * plain.mean()


def test_memory_does_not_grow_with_the_number_of_similarities():
    """Allocations of torch during a call, for 1.5 and for 6 million similarities."""
    peaks = []
    for rows in (3000, 12000):
        queries, rows = make(500, rows, 32)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            cosine_topk(queries, rows, 10)
        peaks.append(max(event.cpu_memory_usage for event in record.events()))
    assert peaks[0] == peaks[1]
    assert 0 < peaks[0] < 3000 * 500


def test_views_of_longer_buffers():
    queries, rows = torch.randn(20, 90)[3:15, 7:80], torch.randn(200, 99)[::2, 20:93]
    check(queries, rows, 12)
    check(torch.randn(1, 40).expand(5, 40), torch.randn(1, 40).expand(9, 40), 9)


def test_merge_of_fewer_columns_than_wanted():
    queries, rows = make(2, 5, 4)
    parts = [cosine_topk(queries, rows[:2], 2), cosine_topk(queries, rows[2:], 3, 2)]
    assert merge_topk(parts, 9).indices.shape == (2, 5)
    assert torch.equal(merge_topk(parts, 9).scores, cosine_topk(queries, rows, 5).scores)
    assert merge_topk(parts[:1], 0).scores.shape == (2, 0)


def test_opcheck():
    for dtype, k in itertools.product(DTYPES, (0, 4)):
        queries, rows = make(3, 7, 5, dtype)
        torch.library.opcheck(torch.ops.gradsafe.cosine_topk.default, (queries, rows, k, 2))


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(queries, rows, scores, indices):
        return cosine_topk(queries * 2, rows, 4, 10, (scores, indices))

    queries, rows = make(3, 20, 9)
    earlier = cosine_topk(queries, torch.randn(10, 9), 4)
    expected = cosine_topk(queries * 2, rows, 4, 10, earlier)
    found = step(queries, rows, *earlier)
    assert isinstance(found, TopK)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_is_not_differentiable():
    queries, rows = make(2, 3, 4)
    with pytest.raises(NotImplementedError, match="detach"):
        cosine_topk(queries.requires_grad_(), rows, 2).scores.sum().backward()


Q, R = torch.ones(2, 5), torch.ones(9, 5)
PAIR = (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64))
BAD_CALLS = [
    (lambda: cosine_topk("x", R, 1), TypeError, "queries to be a tensor, got str"),
    (lambda: cosine_topk(Q, [R], 1), TypeError, "rows to be a tensor, got list"),
    (lambda: cosine_topk(Q[0], R, 1), ValueError, r"queries of shape \[Q, D\], got \[5\]"),
    (lambda: cosine_topk(Q, R[None], 1), ValueError, r"rows of shape \[N, D\], got \[1, 9, 5\]"),
    (lambda: cosine_topk(Q, R[:, :4], 1), ValueError, r"D = 5 like queries, got \[9, 4\]"),
    (lambda: cosine_topk(Q.double(), R, 1), TypeError, "queries of dtype float32, bfloat16"),
    (lambda: cosine_topk(Q, R.long(), 1), TypeError, "rows of dtype float32, bfloat16"),
    (lambda: cosine_topk(Q, R.to_sparse(), 1), TypeError, "rows to be dense"),
    (lambda: cosine_topk(Q, torch.ones(5, 9).T, 1), ValueError, "rows with unit stride"),
    (lambda: cosine_topk(Q, R.to("meta"), 1), ValueError, "rows on cpu like queries, got meta"),
    (lambda: cosine_topk(Q, R, 10), ValueError, "k at most N = 9, .* got 10"),
    (lambda: cosine_topk(Q, R, 13, 0, PAIR), ValueError, "N = 9, .* 3 columns .* got 13"),
    (lambda: cosine_topk(Q, R[:0], 1), ValueError, "k at most N = 0, .* got 1"),
    (lambda: cosine_topk(Q, R, -1), ValueError, "k between 0 and 1024, got -1"),
    (lambda: cosine_topk(Q, torch.ones(2000, 5), 1025), ValueError, "0 and 1024, got 1025"),
    (lambda: cosine_topk(Q, R, 1.0), TypeError, "k to be an int, got float"),
    (lambda: cosine_topk(Q, R, "3"), TypeError, "k to be an int, got str"),
    (lambda: cosine_topk(Q, R, True), TypeError, "k to be an int, got bool"),
    (lambda: cosine_topk(Q, R, 1, None), TypeError, "start to be an int, got NoneType"),
    (lambda: cosine_topk(Q, R, 1, 2**63 - 1), ValueError, r"start \+ N of at most 9223372036854"),
    (lambda: merge_topk(5, 1), TypeError, "parts to be a list of pairs"),
    (lambda: merge_topk([PAIR], "1"), TypeError, "k to be an int, got str"),
    (lambda: cosine_topk(Q, R, 1, -4), ValueError, "start of at least 0, got -4"),
    (lambda: cosine_topk(Q, R, 1, 0, PAIR[0]), TypeError, "previous to be a pair"),
    (lambda: cosine_topk(Q, R, 1, 0, (PAIR[1], PAIR[1])), TypeError, r"previous.scores of dtype"),
    (lambda: cosine_topk(Q[:1], R, 1, 0, PAIR), ValueError, r"previous .* Q = 1 like queries"),
    (lambda: merge_topk([], 1), ValueError, "at least one part"),
    (lambda: merge_topk([PAIR], -1), ValueError, "k of at least 0"),
    (lambda: merge_topk([PAIR, [1]], 1), TypeError, r"parts\[1\] to be a pair"),
    (lambda: merge_topk([(PAIR[0], PAIR[0])], 1), TypeError, r"parts\[0\].indices of dtype"),
    (lambda: merge_topk([(PAIR[0][:, :2], PAIR[1])], 1), ValueError, r"two shapes \[Q, k\]"),
    (
        lambda: merge_topk([PAIR, (PAIR[0][:1], PAIR[1][:1])], 1),
        ValueError,
        r"parts\[1\] with 2 queries like parts\[0\], got 1",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_bad_arguments_name_the_argument(call, error, text):
    with pytest.raises(error, match=rf"gradsafe\.(cosine|merge)_topk: .*{text}"):
        call()


RAW_CALLS = [
    ((Q[0], R, 1, 0), r"queries of shape \[Q, D\]"),
    ((Q, R[:, :4], 1, 0), r"rows of shape \[N, D\] with D = 5"),
    ((Q, R, 10, 0), "k at most N = 9, got 10"),
    ((Q, torch.ones(2000, 5), 1025, 0), "k between 0 and 1024, got 1025"),
    ((Q, R, 1, -1), "start of at least 0"),
    ((Q.double(), R, 1, 0), "queries of dtype"),
    ((Q, R.double(), 1, 0), "rows of dtype"),
    ((Q, torch.ones(5, 9).T, 1, 0), "rows with unit stride"),
]


@pytest.mark.parametrize(("args", "text"), RAW_CALLS)
def test_the_backend_checks_again(args, text):
    with pytest.raises(RuntimeError, match=text):
        torch.ops.gradsafe.cosine_topk(*args)

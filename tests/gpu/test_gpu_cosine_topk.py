"""`cosine_topk` on a real GPU: oracle, determinism, streams, graphs, poison, memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from gradsafe.ops import _default as reference
from gradsafe.ops import cosine_topk, merge_topk

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A chain of 256 products in float32, of unit vectors with random signs, and a rounded score.
NEAR = 24 * 2.0**-24


def make(queries=70, rows=9000, features=600, dtype=torch.float32, row_dtype=None):
    q, r = torch.randn(queries, features), torch.randn(rows, features)
    return q.to(dtype).cuda(), r.to(row_dtype or dtype).cuda()


def same(a, b):
    return torch.equal(a.indices, b.indices) and torch.equal(a.scores, b.scores)


# One query and a few that rows stream past; tiles. Rows of 601 features are no multiple of 16 bytes
# for any dtype; 4,160 features are cut into chunks.
@pytest.mark.parametrize(
    ("count", "features"), [(1, 600), (5, 600), (5, 601), (70, 600), (70, 601), (70, 4160)]
)
@pytest.mark.parametrize(("dtype", "row_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_equals_the_oracle_and_the_cpu(dtype, row_dtype, count, features, paths):
    queries, rows = make(count, features=features, dtype=dtype, row_dtype=row_dtype)
    with paths:
        found = cosine_topk(queries, rows, 50)
    want = reference.cosine_topk(queries.cpu(), rows.cpu(), 9000)
    exact = torch.empty_like(want.scores).scatter_(1, want.indices, want.scores)
    own = exact.gather(1, found.indices.cpu())
    assert torch.all((found.scores.cpu() - own).abs() <= NEAR)
    assert torch.all((found.scores.cpu() - want.scores[:, :50]).abs() <= NEAR)
    on_cpu = cosine_topk(queries.cpu(), rows.cpu(), 50)
    assert torch.all((found.scores.cpu() - on_cpu.scores).abs() <= 2 * NEAR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "rows", "features", "k"),
    [(1, 70_000, 128, 10), (3, 70_000, 128, 100), (500, 5000, 2048, 10), (500, 70_000, 64, 100)],
)
def test_few_and_many_queries_equal_the_oracle(queries, rows, features, k, dtype, paths):
    queries, rows = make(queries, rows, features, dtype)
    with paths:
        found = cosine_topk(queries, rows, k)
    normalize = torch.nn.functional.normalize
    exact = normalize(queries.double(), dim=1) @ normalize(rows.double(), dim=1).T
    assert torch.all((found.scores - exact.gather(1, found.indices)).abs() <= NEAR)
    assert torch.all((found.scores - exact.topk(k, dim=1).values).abs() <= NEAR)
    assert torch.all(found.indices.sort(1).values.diff(dim=1) > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype):
    queries, rows = make(100, 1000, 4096, dtype)
    found = cosine_topk(queries, rows, 1000)
    normalize = torch.nn.functional.normalize
    exact = normalize(queries.double(), dim=1) @ normalize(rows.double(), dim=1).T
    plain = (normalize(queries, dim=1) @ normalize(rows, dim=1).T - exact).abs()
    ours = (found.scores - exact.gather(1, found.indices)).abs()
    assert ours.max() <= 2 * plain.max()
    assert ours.mean() <= 2 * plain.mean()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_does_not_depend_on_the_tile(dtype, paths):
    """40,000 rows take tiles of 128 queries, 9,000 take tiles of 64: the bits are the same."""
    queries, rows = make(130, 40_000, 320, dtype)
    with paths:
        whole = cosine_topk(queries, rows, 60)
    parts = [cosine_topk(queries, part, 60, i * 8000) for i, part in enumerate(rows.split(8000))]
    assert same(merge_topk(parts, 60), whole)


@pytest.mark.parametrize("count", [1, 5, 70])
def test_rows_that_get_better_and_better(count):
    """Every row of a later slab passes the filter."""
    angles = torch.linspace(3, 0.1, 50_000, dtype=torch.float64)
    rows = torch.stack([angles.cos(), angles.sin()], 1).float().cuda()
    queries = torch.tensor([[1.0, 0.0]]).repeat(count, 1).cuda()
    best = torch.arange(50_000).flip(0)[:1000].expand(count, -1)
    assert torch.equal(cosine_topk(queries, rows, 1000).indices.cpu(), best)


@pytest.mark.parametrize("count", [1, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_and_shards_are_bitwise_equal(dtype, count):
    queries, rows = make(count, dtype=dtype)
    rows[5000:] = rows[:4000].clone()  # every score twice
    whole = cosine_topk(queries, rows, 60)
    for _ in range(5):
        assert same(cosine_topk(queries, rows, 60), whole)
    found, start = None, 0
    for size in (1, 4096, 903, 4000):
        shard = rows[start : start + size]
        found = cosine_topk(queries, shard, min(60, start + size), start, found)
        start += size
    assert same(found, whole)


def test_damaged_rows_come_first():
    queries, rows = make()
    rows[8000, 3], rows[17, 599] = float("nan"), float("inf")
    rows[4] = 0
    found = cosine_topk(queries, rows, 3)
    assert found.indices[:, :2].tolist() == [[17, 8000]] * 70
    assert found.scores[:, :2].isnan().all()
    assert found.scores[:, 2].isfinite().all()


def test_runs_on_the_current_stream():
    """The input is written late on a side stream; a kernel elsewhere would read the old values."""
    queries, rows = make()
    expected = cosine_topk(queries, rows, 9)
    late = torch.zeros_like(rows)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(rows)
        found = cosine_topk(queries, late, 9)
    stream.synchronize()
    assert same(found, expected)


def test_capture_and_replay_with_changed_inputs():
    queries, rows = make()
    for _ in range(2):
        cosine_topk(queries, rows, 9)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cosine_topk(queries, rows, 9)
    for sign in (1, -1):
        queries.mul_(sign)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, cosine_topk(queries, rows, 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_the_inputs_is_never_read(dtype):
    def embed(matrix):
        count, features = matrix.shape
        shape = (count + 3, features + 9)
        big = torch.full(shape, float("nan"), dtype=matrix.dtype, device="cuda")
        big[2 : 2 + count, 3 : 3 + features] = matrix
        return big[2 : 2 + count, 3 : 3 + features]

    queries, rows = make(dtype=dtype)
    assert same(cosine_topk(embed(queries), embed(rows), 20), cosine_topk(queries, rows, 20))


def test_memory_does_not_grow_with_the_number_of_rows():
    peaks = []
    for count in (300_000, 900_000):  # both are longer than a slab
        queries, rows = make(300, count, 32)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cosine_topk(queries, rows, 10)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] == peaks[1] < 300 * 150_000 * 4


def test_a_wrong_device_is_named():
    with pytest.raises(ValueError, match="rows on cuda:0 like queries, got cpu"):
        cosine_topk(torch.ones(2, 3, device="cuda"), torch.ones(4, 3), 1)

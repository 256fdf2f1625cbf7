"""The rows most similar to each query, streaming over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.ops.checks import (
    check_dense,
    check_device,
    check_int,
    check_matrix,
    check_supported_device,
    check_tensor,
)
from gradsafe.ops.registry import operator

OP = "cosine_topk"
MAX_K = 1024
MAX_INDEX = 2**63 - 1


class TopK(NamedTuple):
    """The best rows of every query, best first.

    Attributes:
        scores: cosine similarities `[Q, k]`, float32.
        indices: indices of the rows `[Q, k]`, int64.
    """

    scores: Tensor
    indices: Tensor


def cosine_topk(
    queries: Tensor,
    rows: Tensor,
    k: int,
    start: int = 0,
    previous: tuple[Tensor, Tensor] | None = None,
) -> TopK:
    """The k rows with the largest cosine similarity to each query, exactly.

    cos(q, r) = sum_d q_d r_d / (|q| |r|), which RepT ranks training samples by (arXiv 2510.02334).
    Rows stream past up to 1024 queries at a time; scores exist in buffers of a fixed size only,
    never as `[Q, N]`. Products are summed in float32 over at most 256 features and in float64
    beyond, quotients are float64, and a score is rounded to float32 before it is ranked. CUDA
    multiplies in the tensor cores, float32 in two TF32 parts, sums 32 or 64 features there and up
    to 2048 of them (1/16 of D, if that is more) in float32.

    The order is total: larger scores first, equal scores by index. So the result depends neither on
    threads nor on how rows are cut into shards, and AVX2 and AVX-512 agree bit by bit. A zero
    vector, as a query or as a row, has cosine 0 with everything finite. A vector that holds NaN or
    infinity has cosine NaN with everything, and NaN ranks before every number, as in `torch.topk`:
    a damaged row shows up first in every list, a damaged query has nothing but NaN. Vectors of any
    length are safe: those far from 1 are scaled by a power of two first.

    Args:
        queries: `[Q, D]`, float32, bfloat16 or float16; features unbroken in memory.
        rows: `[N, D]` on the same device, one of these dtypes, which may be another. A part of a
            memory-mapped file is fine: nothing is copied but a few rows at a time.
        k: rows per query, 0 to 1024, and at most N (with `previous`, at most N plus its columns).
        start: index of the first row, for one shard of a longer list.
        previous: scores and indices of other shards, as an earlier call returned them; the result
            is then the best of both. Its indices must differ from those of `rows`.

    Returns:
        `TopK` of scores `[Q, k]` and indices `[Q, k]`, best first.

    Raises:
        TypeError: something is no tensor or no int, or of another dtype.
        ValueError: shapes, strides, devices, k or start.
        RuntimeError: CUDA tensors without CUDA kernels, or CUDA failed.

    Example:
        >>> found = None
        >>> for start, shard in shards:
        ...     size = min(k, start + len(shard))
        ...     found = cosine_topk(queries, shard, size, start, found)
    """
    earlier = 0
    if previous is not None:
        _check_pair(OP, "previous", previous)
        earlier = previous[0].shape[1]
    _check(queries, rows, k, start, earlier)
    if previous is not None and len(previous[0]) != len(queries):
        expected = f"previous of shape [Q, k] with Q = {len(queries)} like queries"
        refuse(OP, expected, list(previous[0].shape))
    own = min(k, rows.shape[0])
    found = TopK(*torch.ops.gradsafe.cosine_topk(queries, rows, own, start))
    return found if previous is None else merge_topk([TopK(*previous), found], k)


def merge_topk(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> TopK:
    """Joins results of `cosine_topk` for different rows into the result for all of them.

    Args:
        parts: scores `[Q, k_i]` and indices `[Q, k_i]` of each part, in any order of parts. Every
            part must hold the best min(k, its rows) of its rows, or the join is not exact.
        k: rows per query of the result.

    Returns:
        The best k of all parts, in the order of `cosine_topk`; fewer columns if the parts hold
        fewer together.

    Raises:
        TypeError: a part is no pair of float32 and int64 tensors.
        ValueError: no part, shapes or devices that do not fit, a negative k.
    """
    op = "merge_topk"
    if not isinstance(parts, Sequence) or isinstance(parts, (str, TopK)):
        expected = "parts to be a list of pairs (scores, indices)"
        refuse(op, expected, type(parts).__name__, kind=TypeError)
    check_int(op, "k", k)
    if not parts:
        refuse(op, "at least one part", "none")
    if k < 0:
        refuse(op, "k of at least 0", k)
    for index, part in enumerate(parts):
        name = f"parts[{index}]"
        _check_pair(op, name, part)
        if len(part[0]) != len(parts[0][0]):
            refuse(op, f"{name} with {len(parts[0][0])} queries like parts[0]", len(part[0]))
        check_device(op, name, part[0], "parts[0]", parts[0][0])
    scores = torch.cat([part[0] for part in parts], 1)
    indices = torch.cat([part[1] for part in parts], 1)
    # By index first; the stable sort by score then leaves equal scores in that order.
    indices, order = indices.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    return TopK(scores[:, :k].contiguous(), indices[:, :k].contiguous())


def _check(queries: Tensor, rows: Tensor, k: int, start: int, earlier: int) -> None:
    for name, tensor, shape in (("queries", queries, "[Q, D]"), ("rows", rows, "[N, D]")):
        check_tensor(OP, name, tensor)
        check_matrix(OP, name, tensor, shape=shape)
    if rows.shape[1] != queries.shape[1]:
        expected = f"rows of shape [N, D] with D = {queries.shape[1]} like queries"
        refuse(OP, expected, list(rows.shape))
    check_device(OP, "rows", rows, "queries", queries)
    check_supported_device(OP, queries)
    for name, value in (("k", k), ("start", start)):
        check_int(OP, name, value)
    if not 0 <= k <= MAX_K:
        refuse(OP, f"k between 0 and {MAX_K}", k)
    if k > rows.shape[0] + earlier:
        more = f", plus the {earlier} columns of previous" if earlier else ""
        expected = f"k at most N = {rows.shape[0]}, the number of rows{more}"
        refuse(OP, expected, k, "pass min(k, N)")
    if start < 0:
        refuse(OP, "start of at least 0", start)
    if start > MAX_INDEX - rows.shape[0]:
        refuse(OP, f"start + N of at most {MAX_INDEX}", f"start = {start}")


def _check_pair(op: str, name: str, pair: tuple[Tensor, Tensor]) -> None:
    if not isinstance(pair, tuple) or len(pair) != 2:
        expected = f"{name} to be a pair (scores, indices) of tensors"
        refuse(op, expected, type(pair).__name__, kind=TypeError)
    scores, indices = pair
    for field, tensor, dtype in (
        ("scores", scores, torch.float32),
        ("indices", indices, torch.int64),
    ):
        check_tensor(op, f"{name}.{field}", tensor)
        check_dense(op, f"{name}.{field}", tensor, (dtype,))
    if scores.dim() != 2 or scores.shape != indices.shape:
        got = f"{list(scores.shape)} and {list(indices.shape)}"
        refuse(op, f"{name} of two shapes [Q, k]", got)


@operator(
    "cosine_topk(Tensor queries, Tensor rows, int k, int start) -> (Tensor, Tensor)",
    differentiable=False,
)
def _fake(queries: Tensor, rows: Tensor, k: int, start: int) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return (
        queries.new_empty(shape, dtype=torch.float32),
        queries.new_empty(shape, dtype=torch.int64),
    )

"""The rows most similar to each query, streaming over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from gradsafe.ops.checks import FLOAT_DTYPES, check_device, check_supported_device

OP = "cosine_topk"
MERGE = "merge_topk"
MAX_K = 1024


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
    earlier = 0 if previous is None else _check_previous(previous, queries)
    _check(queries, rows, k, start, earlier)
    own = min(k, rows.shape[0])
    scores, indices = torch.ops.gradsafe.cosine_topk(queries, rows, own, start)
    found = TopK(scores, indices)
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
    if not parts:
        raise ValueError(f"gradsafe.{MERGE}: expected at least one part, got none")
    if k < 0:
        raise ValueError(f"gradsafe.{MERGE}: expected k of at least 0, got {k}")
    for index, part in enumerate(parts):
        _check_pair(MERGE, f"parts[{index}]", part)
        if part[0].shape[0] != parts[0][0].shape[0]:
            raise ValueError(
                f"gradsafe.{MERGE}: expected parts[{index}] with {parts[0][0].shape[0]} queries "
                f"like parts[0], got {part[0].shape[0]}"
            )
        check_device(MERGE, f"parts[{index}]", part[0], "parts[0]", parts[0][0])
    scores = torch.cat([part[0] for part in parts], 1)
    indices = torch.cat([part[1] for part in parts], 1)
    # By index first; the stable sort by score then leaves equal scores in that order.
    indices, order = indices.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    return TopK(scores[:, :k].contiguous(), indices[:, :k].contiguous())


def _check(queries: Tensor, rows: Tensor, k: int, start: int, earlier: int) -> None:
    for name, tensor, shape in (("queries", queries, "[Q, D]"), ("rows", rows, "[N, D]")):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"gradsafe.{OP}: expected {name} to be a tensor, got {type(tensor).__name__}"
            )
        if tensor.dim() != 2:
            raise ValueError(
                f"gradsafe.{OP}: expected {name} of shape {shape}, got {list(tensor.shape)}"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(f"gradsafe.{OP}: expected {name} to be dense, got {tensor.layout}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"gradsafe.{OP}: expected {name} of dtype float32, bfloat16 or float16, got "
                f"{tensor.dtype}"
            )
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(
                f"gradsafe.{OP}: expected {name} with unit stride along its last dimension, got "
                f"strides {list(tensor.stride())}; call .contiguous() first"
            )
    if rows.shape[1] != queries.shape[1]:
        raise ValueError(
            f"gradsafe.{OP}: expected rows of shape [N, D] with D = {queries.shape[1]} like "
            f"queries, got {list(rows.shape)}"
        )
    check_device(OP, "rows", rows, "queries", queries)
    check_supported_device(OP, queries)
    for name, value in (("k", k), ("start", start)):
        if isinstance(value, (bool, float, Tensor)):
            raise TypeError(
                f"gradsafe.{OP}: expected {name} to be an int, got {type(value).__name__}"
            )
    if not 0 <= k <= MAX_K:
        raise ValueError(f"gradsafe.{OP}: expected k between 0 and {MAX_K}, got {k}")
    if k > rows.shape[0] + earlier:
        raise ValueError(
            f"gradsafe.{OP}: expected k at most N = {rows.shape[0]}, the number of rows"
            + (f", plus the {earlier} columns of previous" if earlier else "")
            + f", got {k}; pass min(k, N)"
        )
    if start < 0:
        raise ValueError(f"gradsafe.{OP}: expected start of at least 0, got {start}")


def _check_previous(previous: tuple[Tensor, Tensor], queries: Tensor) -> int:
    _check_pair(OP, "previous", previous)
    if isinstance(queries, Tensor) and previous[0].shape[0] != queries.shape[0]:
        raise ValueError(
            f"gradsafe.{OP}: expected previous of shape [Q, k] with Q = {queries.shape[0]} like "
            f"queries, got {list(previous[0].shape)}"
        )
    return previous[0].shape[1]


def _check_pair(op: str, name: str, pair: tuple[Tensor, Tensor]) -> None:
    if (
        not isinstance(pair, tuple)
        or len(pair) != 2
        or not all(isinstance(tensor, Tensor) for tensor in pair)
    ):
        raise TypeError(
            f"gradsafe.{op}: expected {name} to be a pair (scores, indices) of tensors, got "
            f"{type(pair).__name__}"
        )
    for field, tensor, dtype in zip(TopK._fields, pair, (torch.float32, torch.int64), strict=True):
        if tensor.dtype is not dtype:
            raise TypeError(
                f"gradsafe.{op}: expected {name}.{field} of dtype {dtype}, got {tensor.dtype}"
            )
    scores, indices = pair
    if scores.dim() != 2 or scores.shape != indices.shape:
        raise ValueError(
            f"gradsafe.{op}: expected {name} of two shapes [Q, k], got {list(scores.shape)} and "
            f"{list(indices.shape)}"
        )


@torch.library.register_fake("gradsafe::cosine_topk")
def _fake(queries: Tensor, rows: Tensor, k: int, start: int) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return (
        queries.new_empty(shape, dtype=torch.float32),
        queries.new_empty(shape, dtype=torch.int64),
    )


def _no_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "gradsafe.cosine_topk is not differentiable; detach the tensors you pass to it"
    )


torch.library.register_autograd("gradsafe::cosine_topk", _no_backward)

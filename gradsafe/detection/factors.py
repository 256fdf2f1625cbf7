"""x and dy of one layer and one batch: the factors of weight gradients that are never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.detection.components import slice_values
from gradsafe.detection.token_evidence import layer_token_evidence
from gradsafe.models import Routing
from gradsafe.ops import Axis, grouped_wgrad_moments, moments, wgrad_moments

Prepare = Callable[[Tensor, Axis], None]


class Buffers:
    """One scratch matrix per device and dtype, as large as the largest gradient asked for."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """G = dy^T x, `[O, I]`, in a buffer that the next call overwrites."""
        rows, cols = dy.shape[1], x.shape[1]
        key = (dy.device, dy.dtype)
        flat = self._flat.get(key)
        if flat is None or flat.numel() < rows * cols:
            flat = self._flat[key] = torch.empty(rows * cols, device=dy.device, dtype=dy.dtype)
        out = flat[: rows * cols].view(rows, cols)
        torch.mm(dy.t(), x, out=out)
        return out


@dataclass(frozen=True)
class MatrixFactors:
    """Factors of the gradients of one matrix.

    Attributes:
        x: Inputs `[B, rows, I]`.
        dy: Output gradients `[B, rows, R]`, R the rows of the weight that take part.
        lengths: Rows of each sample; what lies behind them is padding.
        repeat: Rows per token, side by side; 0 where the rows are no tokens.
    """

    x: Tensor
    dy: Tensor
    lengths: list[int]
    repeat: int = 1

    def moments(self, refs: Sequence[Tensor], axis: Axis, unsigned: bool) -> Tensor:
        """Sums over slices `[B, slices, 3 + K]` float64, see `ops.wgrad_moments`."""
        return slice_values(wgrad_moments(self.x, self.dy, refs, axis, unsigned, self.lengths))

    def prepared_moments(
        self, refs: Sequence[Tensor], axis: Axis, unsigned: bool, prepare: Prepare, buffers: Buffers
    ) -> Tensor:
        """The same for gradients that `prepare` has changed, one of which exists at a time."""
        tables = []
        for x, dy in self._samples():
            grad = buffers.weight_gradient(x, dy)
            prepare(grad, axis)
            tables.append(slice_values(moments([grad], [list(refs)], axis, unsigned)))
        return torch.cat(tables)

    def add_mean(self, total: Tensor, count: int) -> None:
        """Add the samples' gradients over `count` to `total [R, I]` float32."""
        pairs = [(x.float(), dy.float() / count) for x, dy in self._samples()]
        x, dy = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        total.addmm_(dy.t(), x)

    def gradients(self, buffers: Buffers) -> Iterator[Tensor]:
        """Each sample's gradient, `[R, I]` float32 in a buffer that the next overwrites."""
        for x, dy in self._samples():
            yield buffers.weight_gradient(x.float(), dy.float())

    def token_evidence(
        self, refs: Sequence[Tensor], factors: Tensor, axis: Axis, unsigned: bool
    ) -> Tensor:
        """Evidence `[T]` of the tokens of a batch of one, see `layer_token_evidence`."""
        if not self.repeat:
            raise ValueError(
                "gradsafe.Detector.explain: a layer of this model sees rows that are no tokens; "
                "their evidence has no place in the text"
            )
        evidence = layer_token_evidence(self.x[0], self.dy[0], refs, factors, axis, unsigned)
        return evidence.view(-1, self.repeat).sum(1)

    def _samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        for b, length in enumerate(self.lengths):
            yield self.x[b, :length], self.dy[b, :length]


@dataclass(frozen=True)
class StackFactors:
    """Factors of the gradients of a stack of expert matrices `[E, R, I]`.

    Rows are sorted by segments, one for each expert and sample that meet. Slices are those of
    every expert in turn: an expert that a sample never reaches has zero sums.

    Attributes:
        x: Inputs `[N, I]`.
        dy: Output gradients `[N, R]`.
        routing: Token and expert of each row.
        experts: Expert of each segment.
        samples: Sample of each segment.
        lengths: Rows of each segment.
        stack: E.
    """

    x: Tensor
    dy: Tensor
    routing: Routing
    experts: list[int]
    samples: list[int]
    lengths: list[int]
    stack: int

    @classmethod
    def of(
        cls, x: Tensor, dy: Tensor, routing: Routing, lengths: Sequence[int], stack: int
    ) -> StackFactors:
        """Drop padding and cut the rows into segments; the counts are copied to the host once.

        Args:
            x: `[N, I]`.
            dy: `[N, R]`.
            routing: Token and expert of each row.
            lengths: Tokens of each sample.
            stack: E.
        """
        samples = torch.zeros_like(routing.experts)
        if routing.tokens is not None:
            samples = routing.tokens // routing.width
            real = torch.tensor(lengths, device=x.device)[samples]
            kept = (routing.tokens % routing.width < real).nonzero()[:, 0]
            if len(kept) < len(x):
                x, dy, samples = x[kept], dy[kept], samples[kept]
                routing = Routing(
                    routing.tokens[kept], routing.experts[kept], routing.samples, routing.width
                )
        keys = routing.experts * routing.samples + samples
        counts = torch.bincount(keys, minlength=stack * routing.samples).tolist()
        met = [key for key, count in enumerate(counts) if count]
        return cls(
            x.contiguous(),
            dy.contiguous(),
            routing,
            [key // routing.samples for key in met],
            [key % routing.samples for key in met],
            [counts[key] for key in met],
            stack,
        )

    def moments(self, refs: Sequence[Tensor], axis: Axis, unsigned: bool) -> Tensor:
        """Sums over slices `[B, E * slices, 3 + K]` float64, see `ops.grouped_wgrad_moments`."""
        result = grouped_wgrad_moments(
            self.x, self.dy, refs, self.lengths, self.experts, axis, unsigned
        )
        return self._spread(slice_values(result), axis)

    def prepared_moments(
        self, refs: Sequence[Tensor], axis: Axis, unsigned: bool, prepare: Prepare, buffers: Buffers
    ) -> Tensor:
        """The same for gradients that `prepare` has changed, one matrix of which exists at a time.

        `prepare` leaves zeros as they are, since experts that were not reached are left out.
        """
        slices = {"tensor": 1, "row": self.dy.shape[1], "column": self.x.shape[1]}
        tables = [torch.empty(0, slices.get(axis, sum(self._shape)), 3 + len(refs))]
        for e, x, dy in self._segments():
            grad = buffers.weight_gradient(x, dy)
            prepare(grad, axis)
            tables.append(slice_values(moments([grad], [[r[e] for r in refs]], axis, unsigned)))
        return self._spread(torch.cat([table.to(self.x.device) for table in tables]), axis)

    def add_mean(self, total: Tensor, count: int) -> None:
        """Add the samples' gradients over `count` to `total [E, R, I]` float32."""
        for e, x, dy in self._segments():
            total[e].addmm_(dy.t().float(), x.float(), alpha=1 / count)

    def token_evidence(
        self, refs: Sequence[Tensor], factors: Tensor, axis: Axis, unsigned: bool
    ) -> Tensor:
        """Evidence `[T]` of the tokens of a batch of one, see `layer_token_evidence`."""
        tokens = self.routing.tokens
        if tokens is None:
            raise ValueError(
                "gradsafe.Detector.explain: the experts of this model do not show which token a "
                "row belongs to; their evidence has no place in the text"
            )
        evidence = torch.zeros(self.routing.width, dtype=torch.float64, device=self.x.device)
        by_expert = factors.unflatten(0, (self.stack, -1))
        begin = 0
        for e, x, dy in self._segments():
            part = layer_token_evidence(x, dy, [r[e] for r in refs], by_expert[e], axis, unsigned)
            evidence.index_add_(0, tokens[begin : begin + len(x)], part)
            begin += len(x)
        return evidence

    @property
    def _shape(self) -> tuple[int, int]:
        return self.dy.shape[1], self.x.shape[1]

    def _segments(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        parts = zip(self.x.split(self.lengths), self.dy.split(self.lengths), strict=True)
        for e, (x, dy) in zip(self.experts, parts, strict=True):
            yield e, x, dy

    def _spread(self, values: Tensor, axis: Axis) -> Tensor:
        """Sums of the segments `[S, slices, 3 + K]` to those of all experts of every sample."""
        rows, cols = self._shape
        table = values.new_zeros(self.routing.samples, self.stack, *values.shape[1:])
        entries = {"tensor": [rows * cols], "row": [cols] * rows, "column": [rows] * cols}
        counts = entries.get(axis, entries["row"] + entries["column"])
        table[..., 0] = torch.tensor(counts, dtype=values.dtype, device=values.device)
        table[self.samples, self.experts] = values
        return table.flatten(1, 2)


Factors = MatrixFactors | StackFactors

"""x and dy of one layer and one batch: the factors of weight gradients that are never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.detection.components import slice_values
from gradsafe.models import Routing
from gradsafe.ops import Axis, grouped_wgrad_moments, moments, wgrad_moments

# Changes a gradient in place before its moments are taken (ablations), given the axis. Only then
# does a gradient exist in memory, one at a time. It must not change zeros in a stack of experts,
# since the experts that a sample does not use are left out.
Prepare = Callable[[Tensor, Axis], Tensor]

# Bytes of the float32 weight gradient in memory at a time; of 1, 2, 4 and 8 MB fastest on a CPU.
PANEL_BYTES = 2 * 2**20


@dataclass(frozen=True)
class MatrixFactors:
    """Factors of the gradients of one matrix."""

    x: Tensor  # inputs [B, rows, I]
    dy: Tensor  # output gradients [B, rows, R], where R are the scored rows of the weight
    lengths: list[int]  # rows of each sample; the rows after them are padding
    repeat: int = 1  # rows per token, side by side; 0 where the rows are not tokens

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    def moments(
        self, refs: Sequence[Tensor], axis: Axis, unsigned: bool, prepare: Prepare | None = None
    ) -> Tensor:
        """Sums over slices `[B, slices, 3 + K]` float64, see `ops.wgrad_moments`."""
        if prepare is None:
            return slice_values(wgrad_moments(self.x, self.dy, refs, axis, unsigned, self.lengths))
        return torch.cat(
            [_prepared(x, dy, refs, axis, unsigned, prepare) for x, dy in self.samples()]
        )

    def add_mean(self, total: Tensor, count: int) -> None:
        """Add the samples' gradients divided by `count` to `total [R, I]` float32."""
        pairs = [(x.float(), dy.float() / count) for x, dy in self.samples()]
        x, dy = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        total.addmm_(dy.t(), x)

    def token_evidence(
        self, refs: Sequence[Tensor], factors: Tensor, axis: Axis, unsigned: bool
    ) -> Tensor:
        """Evidence `[T]` of the tokens of a batch of one, see `layer_token_evidence`."""
        if not self.repeat:
            raise ValueError(
                "gradsafe.Detector.explain: the inputs of one layer of this model are not tokens, "
                "so their evidence cannot be assigned to the text"
            )
        evidence = layer_token_evidence(self.x[0], self.dy[0], refs, factors, axis, unsigned)
        return evidence.view(-1, self.repeat).sum(1)

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each sample's x `[rows, I]` and dy `[rows, R]`, without padding."""
        for b, length in enumerate(self.lengths):
            yield self.x[b, :length], self.dy[b, :length]


@dataclass(frozen=True)
class StackFactors:
    """Factors x `[N, I]` and dy `[N, R]` of the gradients of a stack of E matrices `[E, R, I]`.

    Rows are sorted into segments, one for each pair of an expert and a sample that uses it, with
    an entry in `experts`, `samples` and `lengths` (its rows). Slices are those of every expert in
    turn: an expert that a sample does not use has zero sums.
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
        """Drop padding and divide the rows into segments; `lengths` are the samples' tokens."""
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
        keys, counts = torch.unique(routing.experts * routing.samples + samples, return_counts=True)
        experts, samples = (keys // routing.samples).tolist(), (keys % routing.samples).tolist()
        x, dy = x.contiguous(), dy.contiguous()
        return cls(x, dy, routing, experts, samples, counts.tolist(), stack)

    def __len__(self) -> int:
        """Number of samples."""
        return self.routing.samples

    def moments(
        self, refs: Sequence[Tensor], axis: Axis, unsigned: bool, prepare: Prepare | None = None
    ) -> Tensor:
        """Sums over slices `[B, E * slices, 3 + K]` float64; see `ops.grouped_wgrad_moments`."""
        rows, cols = self.dy.shape[1], self.x.shape[1]
        by_row, by_column = [cols] * rows, [rows] * cols
        counts = {"row": by_row, "column": by_column, "both": by_row + by_column}
        entries = self.x.new_tensor(counts.get(axis, [rows * cols]), dtype=torch.float64)
        table = entries.new_zeros(len(self), self.stack, len(entries), 3 + len(refs))
        table[..., 0] = entries
        if prepare is None:
            segments = self.lengths, self.experts
            result = grouped_wgrad_moments(self.x, self.dy, refs, *segments, axis, unsigned)
            table[self.samples, self.experts] = slice_values(result)
        else:
            for sample, (e, x, dy) in zip(self.samples, self._segments(), strict=True):
                own = [r[e] for r in refs]
                table[sample, e] = _prepared(x, dy, own, axis, unsigned, prepare)[0]
        return table.flatten(1, 2)

    def add_mean(self, total: Tensor, count: int) -> None:
        """Add the samples' gradients divided by `count` to `total [E, R, I]` float32."""
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
                "row belongs to, so their evidence cannot be assigned to the text"
            )
        evidence = torch.zeros(self.routing.width, dtype=torch.float64, device=self.x.device)
        by_expert = factors.unflatten(0, (self.stack, -1))
        begin = 0
        for e, x, dy in self._segments():
            part = layer_token_evidence(x, dy, [r[e] for r in refs], by_expert[e], axis, unsigned)
            evidence.index_add_(0, tokens[begin : begin + len(x)], part)
            begin += len(x)
        return evidence

    def _segments(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        parts = self.x.split(self.lengths), self.dy.split(self.lengths)
        return zip(self.experts, *parts, strict=True)


def layer_token_evidence(
    x: Tensor, dy: Tensor, refs: Sequence[Tensor], factors: Tensor, axis: Axis, unsigned: bool
) -> Tensor:
    """Evidence `[T]` float64 of every token of one prompt in one layer.

    From x `[T, I]`, dy `[T, O]`, K references `[O, I]` and factors `[slices, K]` float64. Its sum
    is the sum over slices and references of factor times dot. With G = dy^T x,
    <abs(G), R> = sum_t dy_t^T (sign(G) * R) x_t holds exactly: the sign of G is fixed by the sum
    over all tokens, and the rest is linear in each token. With a factor per slice and reference,
    e_t = dy_t^T (sign(G) * sum_k factor_k * R_k) x_t, so the references are merged into one matrix
    before they are multiplied with the tokens. G is computed in panels of rows.
    """
    rows, cols = dy.shape[1], x.shape[1]
    # Gradients may be tiny: factors near 1 keep the float32 products in range.
    peak = float(factors.abs().max()) or 1.0
    factors = (factors / peak).to(device=dy.device, dtype=torch.float32)
    # For axis "tensor" this is the one factor of all columns.
    by_column = factors[-cols:] if axis != "row" else torch.zeros_like(factors[:1])
    inputs = x.float()
    evidence = torch.zeros(len(x), dtype=torch.float64, device=dy.device)
    height = max(1, PANEL_BYTES // (4 * cols))
    for begin in range(0, rows, height):
        panel = slice(begin, begin + height)
        outputs = dy[:, panel].float()
        merged = torch.zeros(outputs.shape[1], cols, device=dy.device, dtype=torch.float32)
        for k, ref in enumerate(refs):
            factor = by_column[:, k]
            if axis in ("row", "both"):
                factor = factors[:rows][panel, k, None] + factor
            merged.addcmul_(ref[panel].float(), factor)
        if unsigned:
            merged.mul_((outputs.t() @ inputs).sign_())
        evidence += (outputs * (inputs @ merged.t())).sum(1, dtype=torch.float64)
    return evidence * peak


def _prepared(
    x: Tensor, dy: Tensor, refs: Sequence[Tensor], axis: Axis, unsigned: bool, prepare: Prepare
) -> Tensor:
    """Sums `[1, slices, 3 + K]` of one gradient that `prepare` has changed."""
    grad = dy.t() @ x
    prepare(grad, axis)
    return slice_values(moments([grad], [list(refs)], axis, unsigned))


Factors = MatrixFactors | StackFactors

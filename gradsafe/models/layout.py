"""Where samples and tokens lie in the tensors of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a tensor `[..., F]` is read as `[B, rows, F]`, rows of one token side by side.

    Attributes:
        batch: Axis of the samples.
        time: Axis of the tokens after a merged batch axis was split; None where the rows are no
            tokens of the batch, so that padding cannot be told apart (its gradient is zero).
        merged: Whether the batch axis holds B times something, samples outermost.
    """

    batch: int = 0
    time: int | None = 1
    merged: bool = False

    def common(self, other: Layout) -> Layout | None:
        """The layout that holds for tensors of either, None without one."""
        if self == other:
            return self
        same = (self.batch, self.merged) == (other.batch, other.merged)
        return replace(self, time=None) if same else None

    def rows(self, value: Tensor, samples: int) -> Tensor:
        """Read `[..., F]` as `[samples, rows, F]`; ValueError if it does not have this layout."""
        if self.merged:
            if value.ndim < 2 or value.shape[self.batch] % samples:
                raise ValueError("batch axis is no multiple of the batch size")
            value = value.unflatten(self.batch, (samples, -1))
        if value.ndim < 3 - (self.time is None) or value.shape[self.batch] != samples:
            raise ValueError("no batch axis")
        if self.time is None:
            value = value.movedim(self.batch, 0)
            return value[:, None] if value.ndim == 2 else value.flatten(1, -2)
        return value.movedim((self.batch, self.time), (0, 1)).flatten(1, -2)

    def tokens(self, numbers: Tensor, lead: Sequence[int]) -> Tensor:
        """The number b * T + t of the token of every row of a tensor `[*lead, F]`, in its order.

        `numbers` is `[B, T, 1]` int64; the result `[rows]` holds the first token of the sample
        where rows are no tokens.
        """
        samples = numbers.shape[0]
        sizes = list(lead)
        if self.merged:
            sizes[self.batch : self.batch + 1] = [samples, sizes[self.batch] // samples]
        shape = [1] * len(sizes)
        shape[self.batch] = samples
        if self.time is None:
            return numbers[:, 0, 0].view(shape).expand(sizes).flatten()
        shape[self.time] = numbers.shape[1]
        grid = numbers[..., 0] if self.batch < self.time else numbers[..., 0].t()
        return grid.reshape(shape).expand(sizes).flatten()


def find_layout(shape: Sequence[int], samples: int, tokens: int) -> Layout | None:
    """Recognise the layout of a tensor `[..., F]`; None where no axis belongs to the samples.

    B and T must differ from each other and from all other sizes of the model.
    """
    lead = list(shape[:-1])
    if samples in lead:
        batch = lead.index(samples)
        others = [i for i, size in enumerate(lead) if i != batch and size == tokens]
        return Layout(batch, others[0] if others else None)
    if samples * tokens in lead:
        batch = lead.index(samples * tokens)
        return Layout(batch, batch + 1, merged=True)
    if lead and lead[0] % samples == 0 and lead[0] > 0 and tokens in lead[1:]:
        return Layout(0, lead.index(tokens, 1) + 1, merged=True)  # samples times heads
    return None

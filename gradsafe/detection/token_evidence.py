"""The share of every token in the dots of one layer's weight gradient, which is never stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsafe.ops import Axis

# Bytes of the float32 weight gradient in memory at a time; of 1, 2, 4 and 8 MB fastest on a CPU.
PANEL_BYTES = 2 * 2**20


def layer_token_evidence(
    x: Tensor,
    dy: Tensor,
    refs: Sequence[Tensor],
    factors: Tensor,
    axis: Axis,
    unsigned: bool,
) -> Tensor:
    """Evidence of every token of one prompt in one layer.

    With G = dy^T x, <abs(G), R> = sum_t dy_t^T (sign(G) * R) x_t holds exactly: the sign of G is
    fixed by the sum over all tokens, and the rest is linear in each token. With a factor per slice
    and reference, e_t = dy_t^T (sign(G) * sum_k factor_k * R_k) x_t, so the references are merged
    into one matrix before they are multiplied with the tokens. G is computed in panels of rows.

    Args:
        x: Layer input `[T, I]`, any floating type.
        dy: Output gradient `[T, O]`.
        refs: K references `[O, I]`, at least one.
        factors: `[slices, K]` float64: one slice for axis "tensor", O rows, I columns, or O rows
            before I columns for axis "both".
        axis: What a slice is.
        unsigned: Evidence from abs(G), otherwise from G.

    Returns:
        `[T]` float64; its sum is the sum over slices and references of factor times dot.
    """
    rows, cols = dy.shape[1], x.shape[1]
    # Gradients may be tiny: factors near 1 keep the float32 products in range.
    peak = float(factors.abs().max()) or 1.0
    factors = (factors / peak).to(device=dy.device, dtype=torch.float32)
    by_row = factors[:rows] if axis in ("row", "both") else None
    by_column = factors[-cols:] if axis in ("column", "both") else None
    inputs = x.float()
    evidence = torch.zeros(len(x), dtype=torch.float64, device=dy.device)
    height = max(1, PANEL_BYTES // (4 * cols))
    for begin in range(0, rows, height):
        panel = slice(begin, begin + height)
        outputs = dy[:, panel].float()
        merged = torch.zeros(outputs.shape[1], cols, device=dy.device)
        for k, ref in enumerate(refs):
            part = ref[panel].float()
            if by_row is not None and by_column is not None:
                merged.addcmul_(part, by_row[panel, k, None] + by_column[None, :, k])
            elif by_row is not None:
                merged.addcmul_(part, by_row[panel, k, None])
            elif by_column is not None:
                merged.addcmul_(part, by_column[None, :, k])
            else:
                merged.addcmul_(part, factors[0, k])
        if unsigned:
            merged.mul_((outputs.t() @ inputs).sign_())
        evidence += (outputs * (inputs @ merged.t())).sum(1, dtype=torch.float64)
    return evidence * peak

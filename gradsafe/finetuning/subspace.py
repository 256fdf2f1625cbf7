"""A subspace of alignment gradients, for surgery of rank k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.ops import subspace_surgery_
from gradsafe.ops.subspace_surgery import MAX_RANK

WHO = "AlignmentSubspace"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class AlignmentSubspace:
    """k orthonormal vectors over a list of parameters, and the mean alignment gradient in them.

    Attributes:
        basis: For each parameter its part of the vectors, `[k, *shape]`.
        direction: float64 `[k]`: coordinates of the mean alignment gradient.
        energy: float64 `[k]`: share of the squared norm of the alignment gradients along each
            vector.

    Raises:
        ValueError: The vectors are not orthonormal.
    """

    basis: list[Tensor]
    direction: Tensor
    energy: Tensor

    def __post_init__(self) -> None:
        if not self.basis:
            return
        dtype = self.basis[0].dtype
        if dtype not in TOLERANCE:
            refuse(WHO, "vectors of " + ", ".join(map(str, TOLERANCE)), dtype)
        tolerance, gram = TOLERANCE[dtype], _gram(self.basis)
        error = (gram - torch.eye(len(gram), dtype=gram.dtype)).abs()
        if not error.max() <= tolerance:
            at = [int(i) for i in divmod(int(error.nan_to_num(torch.inf).argmax()), len(gram))]
            expected = f"basis to be orthonormal within {tolerance:g}"
            got = f"an inner product of {float(gram[at[0], at[1]]):.6g} between vectors {at}"
            refuse(WHO, expected, got, "take the singular vectors of the alignment gradients")

    @classmethod
    def from_gradients(
        cls, gradients: Sequence[Sequence[Tensor]], rank: int = 8
    ) -> AlignmentSubspace:
        """Take the first left singular vectors of several alignment gradients.

        SPF (arXiv 2601.10141) takes the first vectors of the gradients of safety rows; each of the
        `m` gradients here is that of one row or batch. Costs m (m + k) reads of a gradient.

        Args:
            gradients: `m` gradients, each a list of tensors with the shapes of the parameters, of
                one dtype and device.
            rank: Vectors k, at most 16 and at most m.

        Returns:
            The subspace, in the gradients' dtype.

        Raises:
            ValueError: No gradients, lists of other shapes, values that are not finite, a rank out
                of range, or gradients that span fewer than `rank` dimensions.
        """
        if not gradients or not gradients[0]:
            refuse(WHO, "at least one gradient with a tensor", len(gradients))
        if isinstance(rank, bool) or not 1 <= rank <= min(MAX_RANK, len(gradients)):
            most = min(MAX_RANK, len(gradients))
            refuse(WHO, f"rank from 1 to {most} with {len(gradients)} gradients", rank)
        shapes = [g.shape for g in gradients[0]]
        for index, own in enumerate(gradients):
            if [g.shape for g in own] != shapes:
                expected = f"gradients[{index}] of the shapes of gradients[0]"
                refuse(WHO, expected, [list(g.shape) for g in own][:4])
        parts = [
            torch.stack([own[i].detach() for own in gradients]) for i in range(len(shapes))
        ]  # [m, *shape]
        gram = _gram(parts)
        if not gram.isfinite().all():
            refuse(WHO, "finite gradients", "NaN or Inf")
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
        if not values[-1] > 1e-10 * values[0]:
            spanned = int((values > 1e-10 * values[0]).sum())
            expected = f"gradients that span {rank} dimensions"
            refuse(WHO, expected, spanned, "lower rank or take more rows")
        mixing = vectors / values.sqrt()  # [m, k]
        device, dtype = parts[0].device, parts[0].dtype
        basis = [torch.tensordot(mixing.T.to(device), part.double(), 1).to(dtype) for part in parts]
        direction = (values.sqrt() * vectors.mean(0)).to(device)
        return cls(basis, direction, values / gram.trace())

    def project_(self, user: Sequence[Tensor], rho: float = 0.0) -> Tensor:
        """Call `gradsafe.ops.subspace_surgery_` on gradients of the parameters, in place.

        Args:
            user: Gradients with the shapes, dtype and device of the basis. Written.
            rho: Weight of the mean alignment gradient that is added.

        Returns:
            float64 `[2 + 2 k]`, see `subspace_surgery_`.

        Raises:
            TypeError, ValueError, RuntimeError: As `subspace_surgery_`.
        """
        return subspace_surgery_(user, self.basis, self.direction, rho)


def _gram(parts: Sequence[Tensor]) -> Tensor:
    """Inner products `[n, n]` of n vectors over all tensors `[n, ...]`, float64 on the CPU."""
    rows = [part.reshape(len(part), part[0].numel()).double() for part in parts]
    return torch.stack([(r @ r.T).cpu() for r in rows]).sum(0)

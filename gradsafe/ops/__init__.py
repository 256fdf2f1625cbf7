"""The fused operators. Each takes lists of tensors, on CPU or CUDA, and works under torch.compile."""

from __future__ import annotations

from gradsafe.ops.moments import AXES, Axis, Moments, moments

__all__ = ["AXES", "Axis", "Moments", "moments"]

"""The fused operators: lists of tensors on CPU or CUDA, also under torch.compile."""

from __future__ import annotations

from gradsafe.ops.moments import AXES, Axis, Moments, moments
from gradsafe.ops.wgrad_moments import wgrad_moments

__all__ = ["AXES", "Axis", "Moments", "moments", "wgrad_moments"]

"""The fused operators: lists of tensors on CPU or CUDA, also under torch.compile."""

from __future__ import annotations

from gradsafe.ops.kl_divergence import kl_divergence, kl_divergence_
from gradsafe.ops.moments import AXES, Axis, Moments, moments
from gradsafe.ops.wgrad_moments import wgrad_moments

__all__ = [
    "AXES",
    "Axis",
    "Moments",
    "kl_divergence",
    "kl_divergence_",
    "moments",
    "wgrad_moments",
]

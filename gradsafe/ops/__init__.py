"""The fused operators: lists of tensors on CPU or CUDA, also under torch.compile."""

from __future__ import annotations

from gradsafe._backend import _C
from gradsafe.ops.cosine_topk import TopK, cosine_topk, merge_topk
from gradsafe.ops.grouped_wgrad_moments import grouped_wgrad_moments
from gradsafe.ops.kl_divergence import kl_divergence, kl_divergence_
from gradsafe.ops.moments import AXES, Axis, Moments, moments
from gradsafe.ops.subspace_surgery import subspace_surgery_
from gradsafe.ops.surgery import surgery_, surgery_merge_, surgery_sums
from gradsafe.ops.surgery_adamw import surgery_adamw_
from gradsafe.ops.wgrad_moments import wgrad_moments

__all__ = [
    "AXES",
    "Axis",
    "Moments",
    "TopK",
    "cosine_topk",
    "grouped_wgrad_moments",
    "kl_divergence",
    "kl_divergence_",
    "merge_topk",
    "moments",
    "subspace_surgery_",
    "surgery_",
    "surgery_adamw_",
    "surgery_merge_",
    "surgery_sums",
    "wgrad_moments",
]

if _C is None:
    import gradsafe.ops._fallback  # noqa: F401

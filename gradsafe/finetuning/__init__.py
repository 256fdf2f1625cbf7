"""Fine-tuning on untrusted data without losing alignment (SafeGrad, arXiv 2508.07172)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsafe._lazy import lazy_names

if TYPE_CHECKING:
    from gradsafe.finetuning.alignment import KLAlignment, SFTAlignment
    from gradsafe.finetuning.config import SafeGradConfig, UnlearningConfig
    from gradsafe.finetuning.statistics import SurgeryStatistics
    from gradsafe.finetuning.subspace import AlignmentSubspace
    from gradsafe.finetuning.surgery import GradientSurgery
    from gradsafe.finetuning.trainer import SafeGradTrainer
    from gradsafe.finetuning.unlearning import UnlearningTrainer

__all__ = [
    "AlignmentSubspace",
    "GradientSurgery",
    "KLAlignment",
    "SFTAlignment",
    "SafeGradConfig",
    "SafeGradTrainer",
    "SurgeryStatistics",
    "UnlearningConfig",
    "UnlearningTrainer",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AlignmentSubspace": "subspace",
        "GradientSurgery": "surgery",
        "KLAlignment": "alignment",
        "SFTAlignment": "alignment",
        "SafeGradConfig": "config",
        "SafeGradTrainer": "trainer",
        "SurgeryStatistics": "statistics",
        "UnlearningConfig": "config",
        "UnlearningTrainer": "unlearning",
    },
)

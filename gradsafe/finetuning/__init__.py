"""Fine-tuning on untrusted data without losing alignment (SafeGrad, arXiv 2508.07172)."""

from gradsafe.finetuning.alignment import KL_TOKENS, KLAlignment, KLTokens, SFTAlignment
from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.finetuning.statistics import SurgeryStatistics
from gradsafe.finetuning.surgery import GradientSurgery

__all__ = [
    "KL_TOKENS",
    "GradientSurgery",
    "KLAlignment",
    "KLTokens",
    "SFTAlignment",
    "SafeGradConfig",
    "SurgeryStatistics",
]

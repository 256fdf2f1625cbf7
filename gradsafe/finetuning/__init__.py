"""Fine-tuning on untrusted data without losing alignment (SafeGrad, arXiv 2508.07172)."""

from gradsafe.finetuning.alignment import KL_TOKENS, KLAlignment, KLTokens, SFTAlignment

__all__ = ["KL_TOKENS", "KLAlignment", "KLTokens", "SFTAlignment"]

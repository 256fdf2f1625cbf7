"""gradsafe: safety tools from the gradients of language models, on one fused backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsafe._lazy import lazy_names
from gradsafe._version import __version__

if TYPE_CHECKING:
    from gradsafe import detection, finetuning, models, ops, screening, tracing
    from gradsafe.detection import Detector, DetectorConfig, Explanation, Scores, correct
    from gradsafe.finetuning import GradientSurgery, SafeGradConfig, SafeGradTrainer
    from gradsafe.finetuning.sft_trainer import SafeGradSFTTrainer as SafeGradSFTTrainer
    from gradsafe.screening import Screener, ScreenScores, screen
    from gradsafe.tracing import Hits, TraceIndex

__all__ = [
    "Detector",
    "DetectorConfig",
    "Explanation",
    "GradientSurgery",
    "Hits",
    "SafeGradConfig",
    "SafeGradTrainer",
    "Scores",
    "ScreenScores",
    "Screener",
    "TraceIndex",
    "__version__",
    "correct",
    "detection",
    "finetuning",
    "models",
    "ops",
    "screen",
    "screening",
    "tracing",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("detection", "finetuning", "models", "ops", "screening", "tracing"), ""),
        **dict.fromkeys(("Detector", "DetectorConfig", "Explanation", "Scores"), "detection"),
        "correct": "detection",
        **dict.fromkeys(("GradientSurgery", "SafeGradConfig", "SafeGradTrainer"), "finetuning"),
        "SafeGradSFTTrainer": "finetuning.sft_trainer",  # needs TRL, so it is not in __all__
        **dict.fromkeys(("ScreenScores", "Screener", "screen"), "screening"),
        **dict.fromkeys(("Hits", "TraceIndex"), "tracing"),
    },
)

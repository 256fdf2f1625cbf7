"""gradsafe: safety tools from the gradients of language models, on one fused backend.

Names are imported on first use, so that `gradsafe --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradsafe._version import __version__

if TYPE_CHECKING:
    from gradsafe import detection, finetuning, models, ops, reference, testbed, tracing
    from gradsafe.detection import Detector, DetectorConfig, Explanation, Scores
    from gradsafe.finetuning import GradientSurgery, SafeGradConfig
    from gradsafe.finetuning.sft_trainer import SafeGradSFTTrainer as SafeGradSFTTrainer
    from gradsafe.finetuning.trainer import SafeGradTrainer
    from gradsafe.tracing import Hits, TraceIndex

_MODULES = ("detection", "finetuning", "models", "ops", "reference", "testbed", "tracing")
_MEMBERS = {
    "Detector": "gradsafe.detection",
    "DetectorConfig": "gradsafe.detection",
    "Explanation": "gradsafe.detection",
    "GradientSurgery": "gradsafe.finetuning",
    "Hits": "gradsafe.tracing",
    "SafeGradConfig": "gradsafe.finetuning",
    "SafeGradSFTTrainer": "gradsafe.finetuning.sft_trainer",  # needs TRL, so not in __all__
    "SafeGradTrainer": "gradsafe.finetuning.trainer",
    "Scores": "gradsafe.detection",
    "TraceIndex": "gradsafe.tracing",
}

__all__ = [
    "Detector",
    "DetectorConfig",
    "Explanation",
    "GradientSurgery",
    "Hits",
    "SafeGradConfig",
    "SafeGradTrainer",
    "Scores",
    "TraceIndex",
    "__version__",
    "detection",
    "finetuning",
    "models",
    "ops",
    "reference",
    "testbed",
    "tracing",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"gradsafe.{name}")
    if name in _MEMBERS:
        return getattr(importlib.import_module(_MEMBERS[name]), name)
    raise AttributeError(f"module 'gradsafe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

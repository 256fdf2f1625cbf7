"""Detection of unsafe prompts: GradCoo, GradSafe and their baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsafe._lazy import lazy_names

if TYPE_CHECKING:
    from gradsafe.detection.calibration import Calibration
    from gradsafe.detection.config import DetectorConfig
    from gradsafe.detection.correction import Answer, correct
    from gradsafe.detection.detector import Detector, UncalibratedWarning
    from gradsafe.detection.explanation import Explanation
    from gradsafe.detection.gradients import NonFiniteGradientError
    from gradsafe.detection.learning import Learning
    from gradsafe.detection.methods import CoverageWarning, ReferenceGapWarning
    from gradsafe.detection.scoring import Scores
    from gradsafe.detection.selection import choose_references

__all__ = [
    "Answer",
    "Calibration",
    "CoverageWarning",
    "Detector",
    "DetectorConfig",
    "Explanation",
    "Learning",
    "NonFiniteGradientError",
    "ReferenceGapWarning",
    "Scores",
    "UncalibratedWarning",
    "choose_references",
    "correct",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("Answer", "correct"), "correction"),
        "Calibration": "calibration",
        "CoverageWarning": "methods",
        "Detector": "detector",
        "DetectorConfig": "config",
        "Explanation": "explanation",
        "Learning": "learning",
        "NonFiniteGradientError": "gradients",
        "ReferenceGapWarning": "methods",
        "Scores": "scoring",
        "UncalibratedWarning": "detector",
        "choose_references": "selection",
    },
)

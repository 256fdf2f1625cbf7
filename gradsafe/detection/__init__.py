"""Detection of unsafe prompts: GradCoo, GradSafe and their baselines."""

from __future__ import annotations

from gradsafe.detection.calibration import Calibration
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.detector import Detector, UncalibratedWarning
from gradsafe.detection.explanation import Explanation
from gradsafe.detection.fitting import CoverageWarning, ReferenceGapWarning
from gradsafe.detection.gradients import NonFiniteGradientError
from gradsafe.detection.scores import Scores

__all__ = [
    "Calibration",
    "CoverageWarning",
    "Detector",
    "DetectorConfig",
    "Explanation",
    "NonFiniteGradientError",
    "ReferenceGapWarning",
    "Scores",
    "UncalibratedWarning",
]

"""gradsafe: safety tools from the gradients of language models, on one fused backend."""

from __future__ import annotations

from gradsafe import ops, reference
from gradsafe._version import __version__
from gradsafe.detection import Detector, DetectorConfig, Scores

__all__ = ["Detector", "DetectorConfig", "Scores", "__version__", "ops", "reference"]

"""`gradsafe calibrate`: a new threshold for a saved detector, with what it belongs to."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import ClassVar

from gradsafe import detection
from gradsafe._io.artifacts import check_destination
from gradsafe._io.processes import Processes
from gradsafe._jobs import detector as detectors
from gradsafe._jobs.detector import FitOptions
from gradsafe._jobs.options import FLAT, ModelOptions, check_positive, transient
from gradsafe.detection.config import DetectorConfig


@dataclass(frozen=True)
class Calibrate:
    """Set the threshold of a saved detector from harmless prompts, for the model as it runs now.

    Attributes:
        detector: Folder of the saved detector; it is replaced.
        calibrate: Harmless prompts of your traffic: JSON Lines, .txt or hf:ID:SPLIT.
        calibrate_unsafe: Unsafe prompts, for a detector of method "cascade".
        max_fpr: False-positive rate to calibrate for.
        model: Model.
        batch_tokens: Padded tokens per batch; results do not depend on it.
        progress: Show progress bars and notes.
    """

    detector: str = ""
    calibrate: str = ""
    calibrate_unsafe: str | None = None
    max_fpr: float = 0.01
    model: ModelOptions = field(default_factory=ModelOptions, metadata=FLAT)
    batch_tokens: int = 4096
    progress: bool = transient(True)

    POSITIONAL: ClassVar = "detector"

    def run(self, processes: Processes | None = None) -> detection.Calibration:
        """Calibrates and saves the detector.

        Raises:
            ValueError, OSError: Inputs or options do not fit; the message says what to do.
        """
        for name in ("detector", "calibrate"):
            if not getattr(self, name):
                what = {"detector": "FOLDER", "calibrate": "FILE of harmless prompts"}[name]
                raise ValueError(f"--{name} is missing: give --{name} {what}")
        self.model.check()
        check_positive(batch_tokens=self.batch_tokens)
        options = FitOptions(
            detector=self.detector,
            calibrate=self.calibrate,
            calibrate_unsafe=self.calibrate_unsafe,
            max_fpr=self.max_fpr,
        )
        options.check(DetectorConfig())
        check_destination(self.detector, "detector")
        prompts = options.read()

        # Everything below needs torch, which takes seconds to import.
        from gradsafe._jobs.model import load_model

        model, tokenizer = load_model(self.model)
        found = detectors.prepare(
            options,
            DetectorConfig(),
            prompts,
            model,
            tokenizer,
            batch_tokens=self.batch_tokens,
            progress=self.progress and sys.stderr.isatty(),
            say=lambda text: print(f"gradsafe: {text}", file=sys.stderr) if self.progress else None,
        )
        found.save(self.detector)
        assert found.calibration is not None
        return found.calibration

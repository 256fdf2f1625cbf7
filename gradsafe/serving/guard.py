"""The threshold that a server owns: refused where it is stale, and watched for drift."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn

from gradsafe._io.artifacts import StorageError, checked, load_folder, read_manifest
from gradsafe.detection.calibration import Calibration
from gradsafe.detection.detector import KIND, Detector, unpack
from gradsafe.detection.facts import FITTED, calibration_facts
from gradsafe.serving.config import LEAST_SCORES


class StaleDetectorError(ValueError):
    """The threshold of a detector was not calibrated for what it would serve."""


def renewal(folder: str | Path, model: str) -> str:
    """The command that calibrates a saved detector again."""
    return (
        f"gradsafe calibrate --detector {quote(str(folder))} --model {model} "
        "--calibrate benign.jsonl"
    )


def check_calibrated(folder: str | Path, model: str) -> None:
    """Reads the manifest alone, before the model is loaded.

    Raises:
        StaleDetectorError: The detector has no calibration, or one without its facts.
        StorageError: The folder is missing, damaged, or not a saved detector.
    """
    _calibration(folder, read_manifest(folder, KIND)["metadata"], model)


def load_current(folder: str | Path, model: nn.Module, tokenizer: Any, name: str) -> Detector:
    """Loads a detector whose calibration belongs to this model and to the libraries in use.

    Args:
        folder: The saved detector.
        model: The model that it is to score with.
        tokenizer: Its tokenizer.
        name: The model and its options as the user gives them, for the command in the message.

    Raises:
        StaleDetectorError: It is not calibrated, or for something else; the message names each
            fact that differs and the command that renews the calibration.
        StorageError: The folder is missing, damaged, or not a saved detector.
    """
    tensors, metadata = load_folder(folder, KIND)
    saved = _calibration(folder, metadata, name).facts or {}
    try:
        given = calibration_facts(model, tokenizer, tensors, metadata) or {}
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{folder} is malformed: {error!r}") from error
    differing = [fact for fact in {**saved, **given} if saved.get(fact) != given.get(fact)]
    if differing:
        raise StaleDetectorError(
            f"{folder} was calibrated for something else: {_listed(differing, saved, given)}; "
            + _advice(differing, folder, name)
        )
    return unpack(folder, tensors, metadata, model, tokenizer)


class DriftMonitor:
    """The latest scores, compared with those of the calibration. Any thread may use it.

    Args:
        calibration: What the threshold comes from.
        size: Number of scores that are kept.
    """

    def __init__(self, calibration: Calibration, size: int) -> None:
        self._calibration = calibration
        self._scores: deque[float] = deque(maxlen=size)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, scores: Iterable[float]) -> None:
        """Takes scores; the oldest make room."""
        with self._lock:
            self._scores.extend(scores)

    def index(self) -> float:
        """Population stability index, see `Calibration.drift`; NaN for less than 100 scores."""
        with self._lock:
            scores = torch.tensor(self._scores, dtype=torch.float64)
        if len(scores) < LEAST_SCORES:
            return math.nan
        return self._calibration.drift(scores)


def _calibration(folder: str | Path, metadata: Mapping[str, Any], model: str) -> Calibration:
    found = checked(folder, metadata.get("calibration"), Calibration | None)  # type: ignore[arg-type]
    if found is None:
        raise StaleDetectorError(
            f"{folder} is not calibrated, and a threshold of another model never fits; calibrate "
            f"it on harmless prompts of your traffic: {renewal(folder, model)}"
        )
    if not found.facts or not found.quantiles:
        raise StaleDetectorError(
            f"{folder} does not say what its calibration belongs to (saved by an older gradsafe); "
            f"renew it: {renewal(folder, model)}"
        )
    assert isinstance(found, Calibration)
    return found


def _listed(names: list[str], saved: Mapping[str, str], given: Mapping[str, str]) -> str:
    return ", ".join(
        f"{name} (calibrated {saved.get(name, 'unknown')}, now {given.get(name, 'unknown')})"
        for name in names
    )


def _advice(differing: list[str], folder: str | Path, model: str) -> str:
    fitted = [name for name in differing if name in FITTED]
    if not fitted:
        return f"renew the calibration: {renewal(folder, model)}"
    return (
        f"its references belong to the former {' and '.join(fitted)} too: load the model as it "
        "was, or fit and calibrate the detector again, with the options that it had: gradsafe "
        f"detect prompts.jsonl --model {model} --unsafe unsafe.jsonl --safe safe.jsonl --calibrate "
        f"benign.jsonl --save_detector {quote(str(folder))}"
    )

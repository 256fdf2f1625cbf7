"""Saved detectors: safetensors and a JSON manifest, bound to one model by its fingerprint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradsafe._io.artifacts import StorageError, load_folder, save_folder
from gradsafe._io.fingerprints import model_fingerprint, tokenizer_fingerprint
from gradsafe.detection.calibration import Calibration
from gradsafe.detection.cascade import Band
from gradsafe.detection.components import ComponentMap
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.methods import GradCoo, GradNorm, GradSafe
from gradsafe.detection.references import Reference
from gradsafe.models import Layers

if TYPE_CHECKING:
    from gradsafe.detection.detector import Detector

KIND = "detector"


def save(detector: Detector, folder: str | os.PathLike[str]) -> None:
    """See `Detector.save`."""
    save_folder(folder, KIND, *pack(detector))


def pack(detector: Detector) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns all of a detector but the model, as tensors and JSON; see `unpack`."""
    tensors = {f"rows/{name}": rows for name, rows in detector.rows.items()}
    scales: dict[str, dict[str, float]] = {}
    method, components = detector.method, detector.component_map
    if isinstance(method, GradCoo):
        _put(tensors, scales, "unsafe", method.unsafe)
        _put(tensors, scales, "safe", method.safe)
    elif isinstance(method, GradSafe):
        _put(tensors, scales, "unsafe", method.unsafe)
        assert method.selected is not None
        tensors["selected"] = method.selected
    metadata = {
        "config": detector.config.to_json(),
        "model": model_fingerprint(detector.model),
        "tokenizer": tokenizer_fingerprint(detector.tokenizer),
        "layers": [layer.name for layer in detector.layers.scored],
        "output_projections": sorted(components.output_projections) if components else [],
        "scales": scales,
        "reference_gap": detector.reference_gap,
        "calibration": detector.calibration.to_json() if detector.calibration else None,
        "band": detector.band.to_json() if detector.band else None,
    }
    return tensors, metadata


def load(
    cls: type[Detector], folder: str | os.PathLike[str], model: nn.Module, tokenizer: Any
) -> Detector:
    """See `Detector.load`."""
    return unpack(cls, folder, *load_folder(folder, KIND), model, tokenizer)


def unpack(
    cls: type[Detector],
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    model: nn.Module,
    tokenizer: Any,
) -> Detector:
    """Makes a detector from what `pack` returned; `folder` says in errors where that was."""
    _check_fingerprint(folder, "model", metadata["model"], model_fingerprint(model))
    _check_fingerprint(folder, "tokenizer", metadata["tokenizer"], tokenizer_fingerprint(tokenizer))
    known = {field.name for field in fields(DetectorConfig)}
    unknown = set(metadata["config"]) - known
    if unknown:
        raise StorageError(
            f"{folder} uses options this version does not know: {sorted(unknown)}; update gradsafe"
        )
    config = DetectorConfig(**metadata["config"])
    detector = cls(model, tokenizer, config)
    detector.reference_gap = metadata["reference_gap"]
    layers = detector.layers
    # The references belong to the rows that were drawn then, whatever a draw would give today.
    detector.rows = {name: _tensor(folder, tensors, f"rows/{name}") for name in detector.rows}
    if config.uses_references:
        granularity = "row+column" if config.method == "gradsafe" else config.granularity
        projections = metadata["output_projections"]
        detector.component_map = ComponentMap(layers, granularity, projections, detector.rows)
        unsafe = _take(folder, tensors, metadata, "unsafe", layers)
        if config.method in ("gradcoo", "cascade"):
            safe = _take(folder, tensors, metadata, "safe", layers)
            detector.method = GradCoo(config, unsafe, safe)
        else:
            detector.method = GradSafe(unsafe, tensors["selected"])
    elif config.uses_gradients:
        detector.component_map = ComponentMap(layers, "tensor", rows=detector.rows)
        detector.method = GradNorm()
    if metadata["calibration"] is not None:
        detector.calibration = Calibration.from_json(metadata["calibration"])
    if metadata.get("band") is not None:
        detector.band = Band.from_json(metadata["band"])
    return detector


def _check_fingerprint(folder: str | os.PathLike[str], what: str, saved: str, given: str) -> None:
    if saved != given:
        raise ValueError(
            f"gradsafe.Detector.load: {folder} was fitted on another {what} (fingerprint "
            f"{saved[:16]}, given {given[:16]}); load it with that {what}, or fit a new detector"
        )


def _put(
    tensors: dict[str, Tensor],
    scales: dict[str, dict[str, float]],
    group: str,
    reference: Reference,
) -> None:
    for name, weight in reference.weights.items():
        tensors[f"{group}/weights/{name}"] = weight
    tensors[f"{group}/std"] = reference.std
    tensors[f"{group}/sum_sq"] = reference.sum_sq
    tensors[f"{group}/nll"] = reference.nll
    scales[group] = reference.scales


def _take(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    group: str,
    layers: Layers,
) -> Reference:
    """One group's reference, each weight on the device of its layer."""
    weights = {}
    for layer in layers.scored:
        weight = _tensor(folder, tensors, f"{group}/weights/{layer.name}")
        weights[layer.name] = weight.to(_device(layer.module))
    return Reference(
        weights=weights,
        scales=metadata["scales"][group],
        std=tensors[f"{group}/std"],
        sum_sq=tensors[f"{group}/sum_sq"],
        nll=tensors[f"{group}/nll"],
    )


def _tensor(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise StorageError(f"{folder} is incomplete: it holds no tensor {name}")
    return tensors[name]


def _device(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")

"""The fitted state of a detector: everything but the model, frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe._io.artifacts import StorageError
from gradsafe.detection.calibration import Band, Calibration
from gradsafe.detection.components import Rows
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.references import Reference
from gradsafe.models import Layers, find_layers


@dataclass(frozen=True)
class DetectorState:
    """What `Detector.fit` and `Detector.calibrate` found; see also the properties of `Detector`."""

    config: DetectorConfig
    rows: Rows = field(default_factory=dict)
    output_projections: tuple[str, ...] = ()  # layers whose input is divided into heads
    references: Mapping[str, Reference] = field(default_factory=dict)  # "unsafe" and "safe"
    learned: Mapping[str, Tensor] = field(default_factory=dict)  # other tensors of the method
    reference_gap: float | None = None
    calibration: Calibration | None = None
    band: Band | None = None

    @property
    def threshold(self) -> float | None:
        """Calibrated threshold, None before."""
        return self.calibration.threshold if self.calibration else None

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state as tensors and JSON values; see `unpack`."""
        tensors = {f"rows/{name}": rows for name, rows in self.rows.items()}
        tensors |= {f"learned/{name}": tensor for name, tensor in self.learned.items()}
        for group, reference in self.references.items():
            tensors |= {f"{group}/weights/{n}": weight for n, weight in reference.weights.items()}
            tensors[f"{group}/sums"] = reference.sums
        band = asdict(self.band) if self.band else None
        metadata = {
            "config": asdict(self.config),
            "output_projections": list(self.output_projections),
            "scales": {group: reference.scales for group, reference in self.references.items()},
            "reference_gap": self.reference_gap,
            "calibration": asdict(self.calibration) if self.calibration else None,
            # JSON has no infinity, which is the default of both ends.
            "band": band and {end: nll for end, nll in band.items() if math.isfinite(nll)},
        }
        return tensors, metadata

    @classmethod
    def unpack(
        cls,
        where: object,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        model: nn.Module,
    ) -> tuple[DetectorState, Layers]:
        """Restore a state from the result of `pack`, read from `where`, and the scored layers.

        Each reference moves to the device of its layer.
        """
        unknown = sorted(set(metadata["config"]) - set(DetectorConfig.__dataclass_fields__))
        if unknown:
            raise StorageError(
                f"{where} uses options this version does not know: {unknown}; update gradsafe"
            )
        config = DetectorConfig(**metadata["config"])
        layers = find_layers(model, config.layers, config.modules)

        def get(name: str) -> Tensor:
            if name not in tensors:
                raise StorageError(f"{where} is incomplete: it holds no tensor {name}")
            return tensors[name]

        def named(group: str) -> dict[str, Tensor]:
            found = (name for name in tensors if name.startswith(f"{group}/"))
            return {name.removeprefix(f"{group}/"): tensors[name] for name in found}

        references = {}
        for group, scales in metadata["scales"].items():
            weights = {
                layer.name: get(f"{group}/weights/{layer.name}").to(_device(layer.module))
                for layer in layers.scored
            }
            references[group] = Reference(weights, scales, get(f"{group}/sums"))
        calibration, band = metadata["calibration"], metadata["band"]
        if calibration is not None:
            interval = tuple(calibration["fpr_interval"])
            calibration = Calibration(**{**calibration, "fpr_interval": interval})
        state = cls(
            config=config,
            rows=named("rows"),  # those of the references, whatever a new draw would give
            output_projections=tuple(metadata["output_projections"]),
            references=references,
            learned=named("learned"),
            reference_gap=metadata["reference_gap"],
            calibration=calibration,
            band=None if band is None else Band(**band),
        )
        return state, layers


def _device(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")

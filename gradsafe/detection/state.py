"""The fitted state of a detector: everything but the model, frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from gradsafe._io.artifacts import StorageError, checked
from gradsafe.detection.calibration import Band, Calibration
from gradsafe.detection.components import Rows
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.learning import Learning
from gradsafe.detection.references import DTYPES, Reference
from gradsafe.models import Layers, find_layers
from gradsafe.models.inspection import text_config

Scale = Annotated[float, msgspec.Meta(gt=0, le=1e30)]


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON values of a state, as `DetectorState.unpack` accepts them."""

    config: dict[str, Any]
    output_projections: tuple[str, ...]
    scales: dict[Literal["unsafe", "safe"], dict[str, Scale]]
    reference_gap: float | None
    learning: Learning | None
    calibration: Calibration | None
    band: Band | None


@dataclass(frozen=True)
class DetectorState:
    """What `fit`, `learn` and `calibrate` of a detector found; see its properties."""

    config: DetectorConfig
    rows: Rows = field(default_factory=dict)
    output_projections: tuple[str, ...] = ()  # layers whose input is divided into heads
    references: Mapping[str, Reference] = field(default_factory=dict)  # "unsafe" and "safe"
    learned: Mapping[str, Tensor] = field(default_factory=dict)  # other tensors of the method
    reference_gap: float | None = None
    learning: Learning | None = None
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
            "learning": asdict(self.learning) if self.learning else None,
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
        facts = checked(where, metadata, Metadata)
        unknown = sorted(set(facts.config) - set(DetectorConfig.__dataclass_fields__))
        if unknown:
            raise StorageError(
                f"{where} uses options this version does not know: {unknown}; update gradsafe"
            )
        config = checked(where, facts.config, DetectorConfig)
        layers = find_layers(model, config.layers, config.modules)
        expected = {"gradsafe": {"unsafe"}}.get(config.method, {"unsafe", "safe"})
        if set(facts.scales) != (expected if config.uses_references else set()):
            raise StorageError(f"{where} is malformed: it has references {sorted(facts.scales)}")

        def get(name: str, shape: Sequence[int | None], *dtypes: torch.dtype) -> Tensor:
            """A tensor, after a look at its shape (None for any size), dtype and values."""
            if name not in tensors:
                raise StorageError(f"{where} is incomplete: it holds no tensor {name}")
            found = tensors[name]
            sizes = zip(found.shape, shape, strict=False)
            fits = found.ndim == len(shape) and all(b in (None, a) for a, b in sizes)
            if not fits or found.dtype not in dtypes:
                raise StorageError(
                    f"{where} is malformed: {name} is {list(found.shape)} {found.dtype}, expected "
                    f"{list(shape)} {dtypes[0]}"
                )
            if found.is_floating_point() and not found.float().isfinite().all():
                raise StorageError(f"{where} is malformed: {name} holds NaN or Inf")
            return found

        rows: Rows = {}
        for layer in layers.scored if any(name.startswith("rows/") for name in tensors) else ():
            kept = rows[layer.name] = get(f"rows/{layer.name}", [None], torch.int64)
            edges = torch.tensor([-1, *kept.tolist(), layer.out_features])
            if not len(kept) or not (edges.diff() > 0).all():
                raise StorageError(f"{where} is malformed: rows/{layer.name} are no rows of it")
        references: dict[str, Reference] = {}
        for group, scales in facts.scales.items():
            weights, squares = {}, 0.0
            for layer in layers.scored:
                if layer.name not in scales:
                    raise StorageError(f"{where} is incomplete: no scale of {group} {layer.name}")
                out = len(rows[layer.name]) if rows else layer.out_features
                shape = [layer.experts] * bool(layer.experts) + [out, layer.in_features]
                weight = get(f"{group}/weights/{layer.name}", shape, DTYPES[config.reference_dtype])
                squares += float(weight.float().square().sum()) * scales[layer.name] ** 2
                weights[layer.name] = weight.to(_device(layer.module))
            sums = get(f"{group}/sums", [None, 3], torch.float64)
            # Rows and columns count every entry twice; the stored weights are rounded.
            times = float(sums[:, 0].sum()) / sum(weight.numel() for weight in weights.values())
            total = float(sums[:, 2].sum()) / max(times, 1.0)
            if (sums[:, [0, 2]] < 0).any() or not total / 2 <= squares <= total * 2:
                raise StorageError(f"{where} is malformed: {group}/sums do not fit its weights")
            references[group] = Reference(weights, scales, sums)
        learned = {}
        if config.method == "gradsafe":
            count = len(references["unsafe"].sums)
            learned["selected"] = get("learned/selected", [count], torch.bool)
            if not learned["selected"].any():
                raise StorageError(f"{where} is malformed: learned/selected chooses nothing")
        if (learning := facts.learning) is not None:
            if config.method != "gradcoo":
                raise StorageError(f"{where} is malformed: method {config.method} learns no labels")
            if learning.layer is not None and learning.layer >= len(layers.blocks):
                raise StorageError(f"{where} is malformed: it has no block {learning.layer}")
            width: int | None = getattr(text_config(model), "hidden_size", None)
            sizes = {"components": len(references["unsafe"].sums), "hidden": width, "bias": 2}
            unused = {"components": "hidden", "hidden": "components"}.get(learning.features)
            for name in sizes.keys() - {unused}:
                learned[name] = get(f"learned/{name}", [sizes[name]], torch.float64)
        state = cls(
            config=config,
            rows=rows,  # those of the references, whatever a new draw would give
            output_projections=facts.output_projections,
            references=references,
            learned=learned,
            reference_gap=facts.reference_gap,
            learning=facts.learning,
            calibration=facts.calibration,
            band=facts.band,
        )
        return state, layers


def _device(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")

"""What all detection methods need to know of a prompt, from one forward and one backward pass.

Many detectors that differ only in granularity, references and the formula of the score would read
the same gradients. `Together` runs them on one pass: the sums over the rows and columns of every
weight hold those of all other granularities. Its scores are those of `Detector.score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsafe import Detector
from gradsafe.detection.components import DOTS, SUM_SQ
from gradsafe.detection.factors import Factors
from gradsafe.detection.gradients import GradientPass
from gradsafe.detection.methods import GradCoo
from gradsafe.models import LinearLayer

MOST_REFERENCES = 4  # of one call of the operator

Arrays = dict[str, np.ndarray]


class Together:
    """Detectors of method "gradcoo" on one model, with the same template, response and layers.

    Args:
        detectors: Name to detector; those of one style of references share its tensors if they were
            made by `variants`.
    """

    def __init__(self, detectors: Mapping[str, Detector]) -> None:
        self.detectors = dict(detectors)
        first = next(iter(self.detectors.values()))
        self.layers, self.first = first.layers, first
        self.blocks = range(2, len(self.layers.blocks), 3)
        self.methods: dict[str, GradCoo] = {}
        # References by the tensors they hold, and the place of each detector's pair among them.
        self.pairs: dict[bool, list[Any]] = {True: [], False: []}
        self.places: dict[str, int] = {}
        for name, detector in self.detectors.items():
            assert isinstance(detector.method, GradCoo)
            pairs = self.pairs[detector.config.unsigned]
            weights = detector.state.references["unsafe"].weights
            held = [known["unsafe"].weights is weights for known in pairs]
            if not any(held):
                pairs.append(detector.state.references)
                held.append(True)
            self.methods[name], self.places[name] = detector.method, held.index(True)

    def __call__(self, prompts: Sequence[str], batch_tokens: int = 1024) -> Arrays:
        """Arrays of `[n]` scores by detector, and of what probes and baselines need.

        "nll" and "gradnorm" are `[n]`, "hidden" `[n, blocks, d]` float32 at the last prompt token,
        and "parts NAME" `[n, C]` float32 the component values of detector NAME where they are
        weight tensors.
        """
        config = self.first.config
        gradients = GradientPass(
            *(self.first.model, self.first.tokenizer, config, self.layers, {}), batch_tokens, True
        )
        items = gradients.encode(prompts, "prompts").items
        found: dict[str, list[Any]] = {}
        sums: dict[tuple[bool, str], Tensor] = {}
        maps = {(m.unsigned, m.config.granularity): m.components for m in self.methods.values()}

        def visit(layer: LinearLayer, factors: Factors) -> None:
            for unsigned, pairs in self.pairs.items():
                if not pairs:
                    continue
                refs = [p[group] for p in pairs for group in ("unsafe", "safe")]
                values = self._moments(layer, factors, refs, unsigned)
                rows = layer.out_features
                by_axis = {
                    "row": values[:, :rows],
                    "column": values[:, rows:],
                    "both": values,
                    "tensor": values[:, :rows].sum(1, keepdim=True),
                }
                for key, components in maps.items():
                    if key[0] == unsigned:
                        axis, index = components[layer]
                        if key not in sums:
                            shape = (len(values), components.size, values.shape[2])
                            sums[key] = torch.zeros(shape, dtype=torch.float64)
                        sums[key].index_add_(1, index, by_axis[axis])

        for indices, nll, states in gradients.run(items, visit, "prompts", self.blocks):
            hidden = states.unflatten(1, (len(self.blocks), -1))
            batch = {"nll": nll, "hidden": hidden, **self._scores(sums)}
            sums.clear()
            for name, values in batch.items():
                found.setdefault(name, [None] * len(items))
                for place, value in zip(indices, values.float().numpy(), strict=True):
                    found[name][place] = value
        return {name: np.stack(values) for name, values in found.items()}

    def _moments(
        self, layer: LinearLayer, factors: Factors, refs: list[Any], unsigned: bool
    ) -> Tensor:
        """Sums `[B, rows + columns, 3 + K]` with any number of references."""
        parts = []
        for start in range(0, len(refs), MOST_REFERENCES):
            some = refs[start : start + MOST_REFERENCES]
            weights = [r.weights[layer.name] for r in some]
            values = factors.moments(weights, "both", unsigned)
            for k, reference in enumerate(some):
                values[..., DOTS + k] *= reference.scales[layer.name]
            parts.append(values if not parts else values[..., DOTS:])
        return torch.cat(parts, dim=2)

    def _scores(self, sums: Mapping[tuple[bool, str], Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, method in self.methods.items():
            table, place = sums[method.unsigned, method.config.granularity], self.places[name]
            dots = table[..., DOTS + 2 * place : DOTS + 2 * place + 2]
            values, parts = method(torch.cat([table[..., :DOTS], dots], dim=2))
            result[name] = values
            if method.config.granularity == "tensor":
                result[f"parts {name}"] = parts
                result["gradnorm"] = table[..., SUM_SQ].sum(1).sqrt()
        return result


def variants(
    model: Any,
    tokenizer: Any,
    style: str,
    references: tuple[Sequence[str], Sequence[str]],
    options: Mapping[str, Mapping[str, Any]],
    **common: Any,
) -> dict[str, Detector]:
    """Detectors "STYLE: NAME" with the options of each name and one copy of the references.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        style: Name of the references.
        references: Unsafe and safe ones.
        options: Name to fields of `DetectorConfig`; one that changes the stored references (such as
            `unsigned`) must be in `common`.
        common: Fields that all have.
    """
    fitted: dict[str, Detector] = {}  # by granularity
    detectors = {}
    for name, own in options.items():
        granularity = own.get("granularity", "tensor")
        if granularity not in fitted:
            fitted[granularity] = Detector.fit(
                *(model, tokenizer, *references),
                granularity=granularity, progress=False, **common,
            )  # fmt: skip
            _share(fitted[granularity], next(iter(fitted.values())))
        base = fitted[granularity]
        state = replace(base.state, config=replace(base.config, **own))
        detectors[f"{style}: {name}"] = Detector(model, tokenizer, state, base.layers)
    return detectors


def _share(detector: Detector, first: Detector) -> None:
    """Lets a detector use the equal reference tensors of another one."""
    shared = {
        name: replace(reference, weights=first.state.references[name].weights)
        for name, reference in detector.state.references.items()
    }
    detector.state = replace(detector.state, references=shared)

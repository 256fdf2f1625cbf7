"""From encoded prompts to scores: gradients for all, for none, or where the loss is not sure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.detection.cascade import Band
from gradsafe.detection.components import ComponentMap
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.gradients import GradientPass, TableCollector
from gradsafe.detection.methods import GradCoo, GradientMethod
from gradsafe.detection.references import prepare_function
from gradsafe.models import Encoded


@dataclass
class ItemScores:
    """Scores of n encoded prompts or windows; fields as in `Scores`."""

    values: Tensor
    components: Tensor
    nll: Tensor
    backward: Tensor


def score_without_gradients(
    gradients: GradientPass, items: Sequence[Encoded], progress: str | None
) -> ItemScores:
    """The loss of the response is the score."""
    nll = gradients.run(items, None, progress=progress)
    none = torch.zeros(len(items), dtype=torch.bool)
    return ItemScores(nll.clone(), torch.empty(len(items), 0), nll, none)


def score_with_gradients(
    method: GradientMethod,
    components: ComponentMap,
    config: DetectorConfig,
    gradients: GradientPass,
    items: Sequence[Encoded],
    owners: Sequence[int],
    keep: bool,
    progress: str | None,
) -> ItemScores:
    """Every item's gradients meet the references.

    Args:
        method: Turns sums into scores.
        components: The component map.
        config: Options.
        gradients: Runs the items.
        items: Encoded prompts or windows.
        owners: Number of the prompt each item comes from, for error messages.
        keep: Keep the value of every component; else there are none.
        progress: Label of the progress bar, None for no bar.
    """
    values = torch.empty(len(items), dtype=torch.float32)
    kept: list[tuple[list[int], Tensor]] = []

    def finish(indices: list[int], table: Tensor) -> None:
        batch_values, batch_parts = method(table)
        values[indices] = batch_values.float()
        if keep:
            kept.append((list(indices), batch_parts.float()))

    collector = TableCollector(
        components,
        method.references,
        method.scales,
        method.unsigned,
        prepare_function(config) if isinstance(method, GradCoo) else None,
        finish,
        owners,
    )
    nll = gradients.run(items, collector.begin, collector.end, progress)
    parts = torch.empty(len(items), kept[0][1].shape[1] if kept else 0)
    for indices, batch_parts in kept:
        parts[indices] = batch_parts
    return ItemScores(values, parts, nll, torch.ones(len(items), dtype=torch.bool))


def score_in_cascade(
    band: Band,
    method: GradientMethod,
    components: ComponentMap,
    config: DetectorConfig,
    gradients: GradientPass,
    items: Sequence[Encoded],
    owners: Sequence[int],
    keep: bool,
    progress: str | None,
) -> ItemScores:
    """Forward passes for all items, gradients for those whose loss lies inside the band."""
    scores = score_without_gradients(gradients, items, progress)
    scores.values = band.sure_scores(scores.nll)
    scores.backward = band.unsure(scores.nll)
    chosen = scores.backward.nonzero()[:, 0].tolist()
    width = components.size if keep else 0
    scores.components = torch.full((len(items), width), torch.nan)
    if chosen:
        inner = score_with_gradients(
            method,
            components,
            config,
            gradients,
            [items[i] for i in chosen],
            [owners[i] for i in chosen],
            keep,
            f"{progress}: unsure ones" if progress else None,
        )
        scores.values[chosen] = inner.values
        scores.components[chosen] = inner.components
    return scores


def worst_windows(values: Tensor, owners: Sequence[int], prompts: int) -> Tensor:
    """Index of each prompt's highest-scoring window: nothing hides behind its harmless part.

    NaN is above every number.
    """
    worst = [-1] * prompts
    keys = [(math.isnan(value), value) for value in values.tolist()]
    for item, owner in enumerate(owners):
        if worst[owner] < 0 or keys[item] > keys[worst[owner]]:
            worst[owner] = item
    return torch.tensor(worst)

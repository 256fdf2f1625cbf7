"""Choosing reference prompts from labelled ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from gradsafe._checks import check_value, refuse
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.gradients import GradientPass
from gradsafe.detection.learning import check_labels
from gradsafe.models import Prompt, find_layers


def choose_references(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    labels: Sequence[Any] | Tensor,
    count: int = 8,
    *,
    layer: int | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
    **options: Any,
) -> tuple[list[int], list[int]]:
    """Choose typical prompts of each class as references.

    It takes those whose hidden states, at the last prompt token, are nearest to the mean of their
    class (Euclidean distance). On SmolLM2 eight of them were better than eight random ones, see
    "Choosing references" in the guide. The others are left to calibrate, to learn from or to test.

    Args:
        model: A causal language model of `transformers`.
        tokenizer: Its tokenizer.
        prompts: Labelled prompts of the expected traffic, at least `count` of each class.
        labels: 1 or True for unsafe, 0 or False for safe.
        count: Number of references of each class.
        layer: Index of the decoder block, negative from the end; None for the middle one.
        batch_tokens: Tokens per batch, padding included.
        progress: Show a progress bar.
        **options: Fields of `DetectorConfig` that decide how a prompt becomes tokens, such as
            template and system.

    Returns:
        Places of the unsafe and of the safe ones in `prompts`, the most typical first.

    Raises:
        ValueError: Fewer than `count` prompts of a class, not one label per prompt, a layer out of
            range, hidden states that are not finite, or as in `Detector.score`.
        TypeError: An argument is of another type.
    """
    where = "choose_references"
    check_value(where, "count", count, int)
    check_value(where, "layer", layer, int | None)
    if count < 1:
        refuse(where, "count >= 1", f"{count}")
    config = DetectorConfig(**{**options, "method": "nll"})
    layers = find_layers(model, config.layers, config.modules)
    depth = len(layers.blocks)
    if layer is not None and not -depth <= layer < depth:
        refuse(where, f"-{depth} <= layer < {depth}", f"layer={layer}")
    block = depth // 2 if layer is None else layer % depth
    gradients = GradientPass(model, tokenizer, config, layers, {}, batch_tokens, progress)
    encoded = gradients.encode(prompts, "prompts")
    truth = check_labels(labels, len(encoded), where)
    firsts = np.searchsorted(encoded.owners, np.arange(len(encoded)))  # first window of each prompt
    items = [encoded.items[first] for first in firsts]
    states: list[Any] = [None] * len(items)
    for indices, _, found in gradients.run(items, None, where, (block,)):
        for index, state in zip(indices, found.double().numpy(), strict=True):
            states[index] = state
    chosen = []
    for name, label in (("unsafe", 1), ("safe", 0)):
        rows = np.flatnonzero(truth == label)
        if len(rows) < count:
            refuse(where, f"at least {count} prompts labelled {name}", f"{len(rows)}")
        own = np.stack([states[row] for row in rows])
        if len(bad := np.flatnonzero(~np.isfinite(own).all(1))):
            refuse(where, "finite hidden states", f"NaN or Inf for prompts[{rows[bad[0]]}]")
        distances = np.linalg.norm(own - own.mean(0), axis=1)
        chosen.append(rows[np.argsort(distances, kind="stable")[:count]].tolist())
    return chosen[0], chosen[1]

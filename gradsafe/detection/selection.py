"""Choosing reference prompts from labelled ones, and testing references before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsafe._checks import check_value, refuse
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.detector import Detector
from gradsafe.detection.gradients import GradientPass
from gradsafe.detection.learning import check_labels
from gradsafe.models import Prompt, find_layers

FOLDS = 4


@dataclass(frozen=True)
class ReferenceCheck:
    """What `check_references` found.

    Attributes:
        auroc: Share of pairs in which the held-out unsafe reference scores above the safe one.
        pairs: Number of pairs.
    """

    auroc: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"a held-out unsafe reference scores above a safe one in {self.auroc:.0%} of "
            f"{self.pairs} pairs"
        )


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


def check_references(
    model: nn.Module,
    tokenizer: Any,
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    *,
    batch_tokens: int = 4096,
    progress: bool = True,
    **options: Any,
) -> ReferenceCheck:
    """Test references on each other: how well do some of them separate the others?

    Up to four times, a detector is fitted without some references of each class and scores those.
    A result near 0.5 or below means that the references share too little, for example a style that
    has nothing to do with safety; they will hardly separate other prompts. With few references it
    is a rough figure. It takes about four times as long as `Detector.fit` with the same references.

    Args:
        model: A causal language model of `transformers`.
        tokenizer: Its tokenizer.
        unsafe: Unsafe references, at least two.
        safe: Safe references, at least two.
        batch_tokens: Tokens per batch, padding included.
        progress: Show progress bars.
        **options: As in `Detector.fit`; a method with references.

    Raises:
        ValueError: Fewer than two references of a class, a method without references, or as in
            `Detector.fit`.
        TypeError: As in `Detector.fit`.
    """
    where = "check_references"
    config = DetectorConfig(**options)
    if not config.uses_references:
        refuse(where, "a method with references", repr(config.method))
    groups = {"unsafe": unsafe, "safe": safe}
    for name, prompts in groups.items():
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or len(prompts) < 2:
            refuse(where, f"{name} to be a list of at least 2 references", f"{prompts!r:.40}")
    folds = min(FOLDS, len(unsafe), len(safe))
    above = []
    for fold in range(folds):
        used = {
            name: [p for place, p in enumerate(prompts) if place % folds != fold]
            for name, prompts in groups.items()
        }
        detector = Detector.fit(
            *(model, tokenizer, used["unsafe"], used["safe"]),
            batch_tokens=batch_tokens, progress=progress, **options,
        )  # fmt: skip
        held_out = [*unsafe[fold::folds], *safe[fold::folds]]
        values = detector.score(held_out, batch_tokens, progress, components=False).values
        high, low = values.split([len(unsafe[fold::folds]), len(safe[fold::folds])])
        difference = high[:, None] - low
        above.append(((difference > 0).double() + (difference == 0).double() / 2).flatten())
    pairs = torch.cat(above)
    return ReferenceCheck(float(pairs.mean()), len(pairs))

"""Passes of `benchmarks.experiments.detection` over random draws of references."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import testbed
from benchmarks.experiments.detection_features import Arrays, Together, variants
from benchmarks.experiments.detection_sets import load
from gradsafe import Detector

PAIRS = 4  # references of each class, unless a pass says otherwise
SIZES, DRAWS = (1, 2, 4, 8, 16), 4  # of references of each class
CHECKED, FOLDS = (4, 8), 4  # numbers of references that are tested on each other
POISONED = 8  # references of each class, some with the wrong label


def drawn_references(name: str) -> Iterator[tuple[str, tuple[list[str], list[str]]]]:
    """`DRAWS` random draws of each number of own references, with their names."""
    texts, labels = load(name, "dev")
    unsafe, safe = (
        [t for t, found in zip(texts, labels, strict=True) if found == label] for label in (1, 0)
    )
    for count, draw in itertools.product(SIZES, range(DRAWS)):
        if count <= min(len(unsafe), len(safe)):
            rng = random.Random(f"{name} {count} {draw}")
            yield f"{count}, draw {draw}", (rng.sample(unsafe, count), rng.sample(safe, count))


def sizes_pass(model: Any, tokenizer: Any, name: str, prompts: list[str]) -> Arrays:
    """GradCoo with each number of own references; the paper's Fig. 3."""
    found: Arrays = {}
    for _, draws in itertools.groupby(drawn_references(name), key=lambda d: d[0].split(",")[0]):
        detectors: dict[str, Detector] = {}
        for style, references in draws:
            detectors |= variants(model, tokenizer, style, references, {"tensor": {}})
        arrays = Together(detectors)(prompts)
        found |= {key: arrays[key] for key in detectors}
    return found


def held_out_auroc(model: Any, tokenizer: Any, unsafe: list[str], safe: list[str]) -> float:
    """Share of pairs of references that detectors order rightly which were fitted on the others."""
    folds, above = min(FOLDS, len(unsafe), len(safe)), []
    for fold in range(folds):
        used = [[p for i, p in enumerate(own) if i % folds != fold] for own in (unsafe, safe)]
        detector = Detector.fit(model, tokenizer, *used, progress=False)
        held_out = [*unsafe[fold::folds], *safe[fold::folds]]
        values = detector.score(held_out, progress=False, components=False).values.numpy()
        high, low = np.split(values, [len(unsafe[fold::folds])])
        above.append(np.heaviside(high[:, None] - low, 0.5).ravel())
    return float(np.concatenate(above).mean())


def checks_pass(model: Any, tokenizer: Any, name: str, prompts: list[str]) -> Arrays:
    """How well references separate each other: those of `sizes_pass` and the generic ones."""
    cases = [("generic", testbed.references(PAIRS)), *drawn_references(name)]
    return {
        style: np.array(held_out_auroc(model, tokenizer, *pair))
        for style, pair in cases
        if len(pair[0]) in CHECKED
    }


def poisoned_pass(model: Any, tokenizer: Any, name: str, prompts: list[str]) -> Arrays:
    """GradCoo with eight own references of each class, of which some have the wrong label."""
    detectors: dict[str, Detector] = {}
    for style, (unsafe, safe) in drawn_references(name):
        if len(unsafe) != POISONED or "draw 0" not in style:
            continue
        for wrong in (1, 2, 3):
            pair = safe[:wrong] + unsafe[wrong:], unsafe[:wrong] + safe[wrong:]
            name_of = f"{POISONED}, {wrong} exchanged"
            detectors |= variants(model, tokenizer, name_of, pair, {"tensor": {}})
    arrays = Together(detectors)(prompts)
    return {key: arrays[key] for key in detectors}

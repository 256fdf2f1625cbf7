"""All detection methods on a real model: SmolLM2-135M-Instruct, as it comes and aligned.

    python -m benchmarks.experiments.detection run       passes over the prompts, resumable (hours)
    python -m benchmarks.experiments.detection tables    CSV and the tables of the docs

`run` keeps one file per (model, set, part, pass) in build/detection: scores of every method, and
what probes need. `tables` only reads these. See `detection_sets` for the parts. References are
"generic" (4 + 4 requests of the testbed, hand-written and in no set) or "own" (4 + 4 development
rows of the set that is tested; they are left out of its development figures).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from benchmarks import smollm2, testbed
from benchmarks.experiments import ROOT
from benchmarks.experiments.detection_draws import (
    PAIRS,
    checks_pass,
    poisoned_pass,
    sizes_pass,
)
from benchmarks.experiments.detection_features import Arrays, Together, variants
from benchmarks.experiments.detection_sets import SETS, contrast, load, own_references
from gradsafe import Detector

WORK = ROOT / "build" / "detection"
MODELS = ("base", "aligned")
CHOSEN = 8  # references of each class that a strategy picks

# Read from one pass with the same stored references.
FORMULAS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "row": {"granularity": "row"},
    "column": {"granularity": "column"},
    "row+column": {"granularity": "row+column"},
    "layer": {"granularity": "layer"},
    "tensor, weighted": {"reduce": "weighted"},
    "tensor, median": {"reduce": "median"},
    "tensor, difference": {"relative": "difference"},
    "tensor, log ratio": {"relative": "logratio"},
    "tensor, difference, no norm": {"relative": "difference", "normalize": False},
    "row, difference": {"granularity": "row", "relative": "difference"},
}
SIGNED: dict[str, dict[str, Any]] = {
    "tensor, no abs": {},
    "row, no abs": {"granularity": "row"},
    "tensor, difference, no abs": {"relative": "difference"},
    "row, difference, no abs": {"granularity": "row", "relative": "difference"},
}
RESPONSES = ("Sure", "Sorry", "Yes", "I cannot", "Sure, here is")


def own(name: str) -> tuple[list[str], list[str]]:
    """Reference prompts from the development rows of a set."""
    prompts, _ = load(name, "dev")
    unsafe, safe = own_references(name, PAIRS)
    return [prompts[i] for i in unsafe], [prompts[i] for i in safe]


def main_pass(model: Any, tokenizer: Any, name: str, prompts: list[str], **options: Any) -> Arrays:
    """GradCoo in all forms with both styles of references, gradient norm, NLL, hidden states."""
    detectors = {}
    for style, references in (("generic", testbed.references(PAIRS)), ("own", own(name))):
        detectors |= variants(model, tokenizer, style, references, FORMULAS, **options)
    signed = {"unsigned": False, **options}
    references = testbed.references(PAIRS)
    detectors |= variants(model, tokenizer, "generic", references, SIGNED, **signed)
    return Together(detectors)(prompts)


def gradsafe_pass(model: Any, tokenizer: Any, name: str, prompts: list[str]) -> Arrays:
    """GradSafe as published, with both styles of references."""
    found = {}
    for style, references in (("generic", testbed.references(PAIRS)), ("own", own(name))):
        for gap in (1.0, 0.5, 0.2, 0.0):
            try:
                detector = Detector.fit(
                    model, tokenizer, *references, method="gradsafe", gap=gap, progress=False
                )
            except ValueError:  # nothing separates the references by so much
                continue
            scores = detector.score(prompts, batch_tokens=1024, components=False)
            found |= {f"{style}: GradSafe": scores.values.numpy(), f"{style}: gap": np.array(gap)}
            break
    return found


def response_pass(model: Any, tokenizer: Any, name: str, prompts: list[str]) -> Arrays:
    """The NLL of other responses."""
    found = {}
    for response in RESPONSES:
        detector = Detector.fit(model, tokenizer, method="nll", response=response, progress=False)
        found[f"NLL {response}"] = detector.score(prompts, progress=False).values.numpy()
    return found


def others_pass(model: Any, tokenizer: Any, name: str, prompts: list[str]) -> Arrays:
    """GradCoo with other responses, the other order of averaging and a cut prefix."""
    found: Arrays = {}
    kinds: dict[str, dict[str, Any]] = {
        "cut": {"prefix": "cut"},
        "norm then mean": {"reference_order": "norm_then_mean"},
        **{response: {"response": response} for response in RESPONSES[1:]},
        "Sure with EOS": {"append_eos": True},
    }
    for kind, options in kinds.items():
        detector = Detector.fit(model, tokenizer, *own(name), progress=False, **options)
        scores = detector.score(prompts, batch_tokens=1024, components=False)
        found[f"own: tensor, {kind}"] = scores.values.numpy()
    return found


def eos_pass(model: Any, tokenizer: Any, name: str, prompts: list[str]) -> Arrays:
    """GradCoo with a response that ends with the EOS token, as GradSafe has it."""
    forms = {"tensor": {}, "row": {"granularity": "row"}}
    detectors = variants(model, tokenizer, "own, EOS", own(name), forms, append_eos=True)
    arrays = Together(detectors)(prompts)
    return {key: arrays[key] for key in detectors}


def chosen_references(
    variant: str, name: str, count: int, strategy: str
) -> tuple[list[str], list[str]]:
    """`count` development rows of each class, by their hidden states in the middle block.

    "central": nearest to the mean of the class; "spread": nearest to the centres of its `count`
    clusters; "apart": farthest along the difference of the two means; "boundary": nearest.
    """
    texts, labels = load(name, "dev")
    with np.load(stored(variant, name, "dev", "main")) as file:
        states = file["hidden"][:, file["hidden"].shape[1] // 2].astype(np.float64)
    truth = np.array(labels)
    unsafe, safe = (states[truth == label].mean(0) for label in (1, 0))
    along = (states - (unsafe + safe) / 2) @ (unsafe - safe)
    picked = []
    for label, sign in ((1, 1.0), (0, -1.0)):
        rows = np.flatnonzero(truth == label)
        own = states[rows]
        if strategy == "central":
            order = np.linalg.norm(own - own.mean(0), axis=1).argsort()
        elif strategy == "spread":
            centres = KMeans(count, n_init=10, random_state=0).fit(own).cluster_centers_
            distances = np.linalg.norm(own[None] - centres[:, None], axis=2)
            order = linear_sum_assignment(distances)[1]
        else:
            order = (-sign * along[rows]).argsort()
            order = order if strategy == "apart" else order[::-1]
        picked.append([texts[i] for i in rows[order[:count]]])
    return picked[0], picked[1]


def choice_pass(model: Any, tokenizer: Any, name: str, prompts: list[str]) -> Arrays:
    """GradCoo of the base model with references chosen from the development rows."""
    detectors = {}
    for strategy in ("central", "spread", "apart", "boundary"):
        references = chosen_references("base", name, CHOSEN, strategy)
        style = f"{CHOSEN} {strategy}"
        detectors |= variants(model, tokenizer, style, references, {"tensor": {}})
    arrays = Together(detectors)(prompts)
    return {key: arrays[key] for key in detectors}


Pass = Callable[[Any, Any, str, list[str]], Arrays]
# Name to the pass, and the sets and parts that it is for.
PASSES: dict[str, tuple[Pass, tuple[str, ...], tuple[str, ...]]] = {
    "main": (main_pass, tuple(SETS), ("dev", "test")),
    "gradsafe": (gradsafe_pass, tuple(SETS), ("dev", "test")),
    "responses": (response_pass, tuple(SETS), ("dev", "test")),
    "eos": (eos_pass, tuple(SETS), ("dev", "test")),
    "choice": (choice_pass, ("XSTest", "ToxicChat"), ("test",)),
    "sizes": (sizes_pass, ("XSTest", "ToxicChat"), ("test",)),
    "checks": (checks_pass, ("XSTest", "ToxicChat"), ("test",)),
    "poisoned": (poisoned_pass, ("XSTest", "ToxicChat"), ("test",)),
    "others": (others_pass, ("XSTest", "ToxicChat"), ("dev",)),
}


def stored(variant: str, name: str, part: str, what: str) -> Path:
    """The file of one pass."""
    return WORK / f"{variant} {name} {part} {what}.npz".replace(" ", "_")


def run(variant: str, sets: list[str], passes: list[str], parts: list[str]) -> None:
    """Makes the files that are missing, one after another."""
    model, tokenizer = smollm2.load(variant)  # type: ignore[arg-type]
    WORK.mkdir(parents=True, exist_ok=True)
    direction = stored(variant, "contrast", "dev", "main")
    if not direction.exists():
        unsafe, safe = contrast()
        detectors = variants(model, tokenizer, "generic", testbed.references(PAIRS), {"tensor": {}})
        together = Together(detectors)
        _save(direction, {"labels": np.array([1] * len(unsafe) + [0] * len(safe)),
                          **together([*unsafe, *safe])})  # fmt: skip
        _save(stored(variant, "generic", "dev", "main"), {
            "labels": np.array([1] * PAIRS + [0] * PAIRS),
            **together([*testbed.references(PAIRS)[0], *testbed.references(PAIRS)[1]]),
        })  # fmt: skip
    for what in passes:
        function, wanted, for_parts = PASSES[what]
        for part in for_parts:
            for name in wanted:
                path = stored(variant, name, part, what)
                if part in parts and name in sets and not path.exists():
                    prompts, labels = load(name, part)  # type: ignore[arg-type]
                    print(f"{variant} {name} {part} {what}: {len(prompts)} prompts", flush=True)
                    arrays = function(model, tokenizer, name, prompts)
                    _save(path, {"labels": np.array(labels), **arrays})


def _save(path: Path, arrays: Arrays) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    work = commands.add_parser("run", help="passes over the prompts")
    work.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    work.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    work.add_argument("--passes", nargs="*", default=list(PASSES), choices=list(PASSES))
    work.add_argument("--parts", nargs="*", default=["dev", "test"], choices=["dev", "test"])
    commands.add_parser("tables", help="CSV and the tables of the docs")
    arguments = parser.parse_args()
    if arguments.command == "run":
        for variant in arguments.models:
            run(variant, arguments.sets, arguments.passes, arguments.parts)
        return 0
    from benchmarks.experiments.detection_tables import write

    write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

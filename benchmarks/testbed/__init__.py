"""The embedded default model: a tiny aligned chat model that the package trains itself.

Llama architecture, about a million parameters, with tokenizer and chat template. It answers
ordinary requests with "Sure, ..." and refuses unsafe ones, well enough on prompts it has never
seen to try every method of the package on it. Nothing is downloaded: the text comes from word
lists in this folder, training takes about a minute on two CPU cores and is cached.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.testbed.cache import announce, cache_root, damage, publish, seal
from benchmarks.testbed.corpus import Row, build, fresh_rows
from benchmarks.testbed.reference_prompts import SAFE_REFERENCES, UNSAFE_REFERENCES
from benchmarks.testbed.tokenizer import CHAT_TEMPLATE
from benchmarks.testbed.training import SYSTEM_MESSAGES, Recipe, isolated, train

__all__ = ["calibration_prompts", "load", "prompts", "references"]


def _recipe_hash(recipe: Recipe) -> str:
    """Names a trained testbed by all that went into it: rows, recipe, chat template."""
    parts = [asdict(recipe), build()["train"], CHAT_TEMPLATE, SYSTEM_MESSAGES]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read(folder: Path, threads: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Loads a whole folder; making the model draws initial weights, hence the isolation."""
    with isolated(threads):
        # Not from_pretrained, which draws a progress bar for a file of four megabytes.
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, local_files_only=True))
        load_model(model, folder / "model.safetensors")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.float().eval(), tokenizer


def load(
    cache: str | os.PathLike[str] | None = None, progress: bool = True
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Returns the testbed; the first call trains it, which takes about a minute.

    Args:
        cache: Folder to keep the trained model in. Default: ``$GRADSAFE_CACHE``, else the
            user's cache folder.
        progress: Show a progress bar while training.

    Returns:
        The model (float32, eval mode, on the CPU) and its tokenizer. The model is the caller's
        own: changing it does not touch the cache.

    Raises:
        OSError: If the cache folder cannot be written.
    """
    recipe = Recipe()
    folder = cache_root(cache) / f"testbed-{_recipe_hash(recipe)}"
    problem = damage(folder) if folder.exists() else "absent"
    if problem is not None:
        if problem != "absent":
            announce(f"the cached testbed is damaged ({problem}) and will be trained again")
        announce(f"training the testbed once, about a minute; it is cached in {folder}")

        def write(temporary: Path) -> None:
            start = time.perf_counter()
            model, tokenizer, losses = train(build()["train"], recipe, progress=progress)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            seconds = round(time.perf_counter() - start, 1)
            facts = {"recipe": asdict(recipe), "seconds": seconds, "last_loss": losses[-1]}
            seal(temporary, {**facts, "torch": torch.__version__})

        publish(folder, write)
    return _read(folder, torch.get_num_threads())


def prompts(
    split: Literal["train", "heldout"], label: Literal["safe", "unsafe"] | None = None
) -> list[Row]:
    """Returns the prompts of one split.

    Args:
        split: "train", or "heldout": prompts made of combinations, and in part of words, phrases
            and frames, that training never showed.
        label: Only the prompts of this label.

    Returns:
        Dicts with keys prompt, label ("safe" or "unsafe") and kind ("ordinary", "unsafe", or
        "lookalike": harmless, but in the words of unsafe requests).

    Raises:
        ValueError: If an argument is none of the named words.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'benchmarks.testbed: split must be "train" or "heldout", got {split!r}')
    if label not in (None, "safe", "unsafe"):
        raise ValueError(f'benchmarks.testbed: label must be "safe" or "unsafe", got {label!r}')
    return [
        {name: row[name] for name in ("prompt", "label", "kind")}
        for row in build()[split]
        if label is None or row["label"] == label
    ]


def references(pairs: int = 2) -> tuple[list[str], list[str]]:
    """Returns reference prompts in the style of the traffic, in neither of the two splits.

    Args:
        pairs: How many prompts of each label.

    Returns:
        Unsafe prompts and safe prompts.

    Raises:
        ValueError: If there are fewer than ``pairs`` or ``pairs`` is not positive.
    """
    if not 1 <= pairs <= len(UNSAFE_REFERENCES):
        raise ValueError(
            f"benchmarks.testbed: pairs must be 1 to {len(UNSAFE_REFERENCES)}, got {pairs}"
        )
    return list(UNSAFE_REFERENCES[:pairs]), list(SAFE_REFERENCES[:pairs])


def calibration_prompts(label: Literal["safe", "unsafe"] = "safe") -> list[str]:
    """Returns prompts to set thresholds with.

    They are drawn as the held-out prompts of that label are (safe: ordinary and look-alikes), but
    occur neither there nor in training nor among the references.

    Args:
        label: Harmless prompts, or unsafe ones.

    Raises:
        ValueError: If the label is none of the two.
    """
    if label not in ("safe", "unsafe"):
        raise ValueError(f'benchmarks.testbed: label must be "safe" or "unsafe", got {label!r}')
    if label == "unsafe":
        return [row["prompt"] for row in fresh_rows("calibration", 400, 0, 0)]
    return [row["prompt"] for row in build()["calibration"]]

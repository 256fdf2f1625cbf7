"""The testbed: a tiny aligned chat model that is trained on first use.

Llama architecture with about a million parameters, a tokenizer and a chat template. It answers
ordinary requests with "Sure, ..." and refuses unsafe ones, also on prompts that it has never seen,
so that every method of the package can be tried on it. Nothing is downloaded: the text is generated
from the files in `data`. Training takes about a minute on two CPU cores, and the result is cached.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from benchmarks.testbed.corpus import Row, build, fresh_rows
from benchmarks.testbed.texts import CHAT_TEMPLATE, REFERENCES, SYSTEM_MESSAGES
from benchmarks.testbed.training import Recipe, isolated, train
from gradsafe._io.cache import announce, cache_root, ensure

__all__ = ["calibration_prompts", "folder", "load", "prompts", "references"]

Label = Literal["safe", "unsafe"]


def _recipe_hash(recipe: Recipe) -> str:
    """Hash of everything that determines the trained weights."""
    parts = [asdict(recipe), build()["train"], CHAT_TEMPLATE, SYSTEM_MESSAGES]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def folder(cache: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """Returns the folder of the trained model; the first call trains it, in about a minute.

    Args:
        cache: Folder for the trained model. Default: ``$GRADSAFE_CACHE``, else the user's cache
            folder.
        progress: Show a progress bar during training.

    Returns:
        A model folder in the Hugging Face layout, for ``gradsafe detect --model`` and the like.

    Raises:
        OSError: If the cache folder cannot be written.
    """
    recipe = Recipe()
    path = cache_root(cache) / f"testbed-{_recipe_hash(recipe)}"

    def fill(scratch: Path) -> dict[str, Any]:
        announce(f"training the testbed once, about a minute; it is cached in {path}")
        start = time.perf_counter()
        model, tokenizer, losses = train(build()["train"], recipe, progress=progress)
        hf_logging.disable_progress_bar()  # one for a file of four megabytes
        model.save_pretrained(scratch)
        hf_logging.enable_progress_bar()
        tokenizer.save_pretrained(scratch)
        seconds = round(time.perf_counter() - start, 1)
        facts = {"recipe": asdict(recipe), "seconds": seconds, "last_loss": losses[-1]}
        return {**facts, "torch": torch.__version__}

    ensure(path, fill)
    return path


def load(
    cache: str | os.PathLike[str] | None = None, progress: bool = True
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Returns the trained model (float32, eval mode, on the CPU) and its tokenizer.

    Arguments and errors are those of `folder`. The model may be changed: the cache is unaffected.
    """
    path = folder(cache, progress)
    with isolated(torch.get_num_threads()):  # creating the model draws initial weights
        # Not from_pretrained, which shows a progress bar for a file of four megabytes.
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(path, local_files_only=True))
        load_model(model, path / "model.safetensors")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    return model.float().eval(), tokenizer


def _check(name: str, value: str | None, first: str, second: str) -> None:
    if value not in (first, second):
        raise ValueError(
            f'benchmarks.testbed: {name} must be "{first}" or "{second}", got {value!r}'
        )


def prompts(split: Literal["train", "heldout"], label: Label | None = None) -> list[Row]:
    """Returns the prompts of one split.

    Args:
        split: "train", or "heldout": combinations that training never showed, partly with new
            words, phrases and frames.
        label: Only the prompts with this label.

    Returns:
        Dicts with keys prompt, label ("safe" or "unsafe") and kind ("ordinary", "unsafe", or
        "lookalike": harmless, but in the words of unsafe requests).

    Raises:
        ValueError: If an argument has another value.
    """
    _check("split", split, "train", "heldout")
    if label is not None:
        _check("label", label, "safe", "unsafe")
    return [
        {name: row[name] for name in ("prompt", "label", "kind")}
        for row in build()[split]
        if label in (None, row["label"])
    ]


def references(pairs: int = 2) -> tuple[list[str], list[str]]:
    """Returns unsafe and safe reference prompts, which resemble both splits and are in neither.

    Args:
        pairs: Number of prompts of each label.

    Raises:
        ValueError: If there are fewer than ``pairs`` or ``pairs`` is not positive.
    """
    unsafe, safe = REFERENCES["unsafe"], REFERENCES["safe"]
    if not 1 <= pairs <= len(unsafe):
        raise ValueError(f"benchmarks.testbed: pairs must be 1 to {len(unsafe)}, got {pairs}")
    return unsafe[:pairs], safe[:pairs]


def calibration_prompts(label: Label = "safe") -> list[str]:
    """Returns prompts for setting thresholds.

    They follow the distribution of the held-out prompts of that label (safe: ordinary and
    look-alikes), but are neither held-out, training nor reference prompts.

    Args:
        label: Harmless or unsafe prompts.

    Raises:
        ValueError: If the label has another value.
    """
    _check("label", label, "safe", "unsafe")
    rows = build()["calibration"] if label == "safe" else fresh_rows("calibration", 400, 0, 0)
    return [row["prompt"] for row in rows]

"""The trainer of transformers: its default arguments, checks of those given, and its folder."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

# The defaults are those of the paper.
TRAINING = {
    "per_device_train_batch_size": 10,
    "learning_rate": 1e-5,
    "num_train_epochs": 10.0,
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}
SET_ELSEWHERE = {
    "output_dir": "--output",
    "resume_from_checkpoint": "--resume",
    "disable_tqdm": "--progress false",
    "use_cpu": "--device",
}


def checked_training(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of TrainingArguments under their present names, with checked types.

    Raises:
        ValueError: A key is unknown or given twice, or a value is of another type.
    """
    import difflib

    from jsonargparse import ArgumentParser
    from transformers import TrainingArguments

    from gradsafe.models.compat import training_option

    known = {item.name for item in fields(TrainingArguments) if item.init}
    types = ArgumentParser(exit_on_error=False)
    # The annotation of fsdp does not name everything that it accepts.
    types.add_class_arguments(TrainingArguments, fail_untyped=False, skip={"output_dir", "fsdp"})
    given: dict[str, Any] = {}
    for key, value in values.items():
        name = training_option(key, known)
        if name not in known:
            near = difflib.get_close_matches(key, known - set(SET_ELSEWHERE), n=1, cutoff=0.0)
            raise ValueError(f"training.{key}: unknown key, did you mean {near[0]}?")
        if name in given:
            raise ValueError(f"training.{key} is the same as {name}: leave one of them out")
        if name.endswith("_strategy") and value is False:
            value = "no"  # of YAML
        if name != "fsdp":
            try:
                value = types.parse_object({name: value})[name]
            except Exception as error:  # of several kinds, by the version of jsonargparse
                reason = " ".join(str(error).split()).partition(": ")[2]
                raise ValueError(f"training.{key}: {reason or error}") from error
        given[name] = value
    return given


def begun(folder: Path) -> tuple[str, bool]:
    """The folder of a training, new or with a checkpoint to continue from, and which of the two."""
    from gradsafe.finetuning.checkpoint import last

    found = last(folder)
    if folder.exists() and not found:
        shutil.rmtree(folder)
    return str(folder), found is not None

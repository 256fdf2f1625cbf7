"""Checks of the trainer's setup before any work starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradsafe._checks import check_value, refuse
from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.models.compat import loaded_sharded, static_graph

_FINITE = math.nextafter(math.inf, 0.0)
# Smallest and largest value of training arguments; beyond them, training does nothing, goes
# astray, or fails later with an error that does not name the argument.
_LIMITS: Mapping[str, tuple[type, float, float]] = {
    "per_device_train_batch_size": (int, 1, math.inf),
    "per_device_eval_batch_size": (int, 1, math.inf),
    "gradient_accumulation_steps": (int, 1, math.inf),
    "learning_rate": (float, 0.0, _FINITE),
    "weight_decay": (float, 0.0, _FINITE),
    "max_grad_norm": (float, 0.0, math.inf),
    "adam_beta1": (float, 0.0, math.nextafter(1.0, 0.0)),
    "adam_beta2": (float, 0.0, math.nextafter(1.0, 0.0)),
    "adam_epsilon": (float, 0.0, _FINITE),
    "label_smoothing_factor": (float, 0.0, math.nextafter(1.0, 0.0)),
}


def check_arguments(args: Any) -> None:
    """Raises TypeError or ValueError for training arguments that cannot train."""
    owner = "SafeGradTrainer"
    for name, (kind, least, most) in _LIMITS.items():
        value = getattr(args, name)
        if name == "max_grad_norm" and value is None:  # no clipping
            continue
        check_value(owner, name, value, kind)
        if not least <= value <= most:
            below = "" if most == math.inf else " and finite" if most > 1 else " and below 1"
            refuse(owner, f"{name} to be at least {least:g}{below}", value)
    check_value(owner, "max_steps", args.max_steps, int)
    if args.max_steps < 1 and args.max_steps != -1:
        refuse(owner, "max_steps to be at least 1, or -1 for num_train_epochs", args.max_steps)
    if args.max_steps == -1:
        check_value(owner, "num_train_epochs", args.num_train_epochs, float)
        if not 0 < args.num_train_epochs < math.inf:
            refuse(owner, "num_train_epochs to be above 0 and finite", args.num_train_epochs)


def check_supported(trainer: Any) -> None:
    """Raises ValueError for setups in which the surgery cannot find the gradients."""
    args = trainer.args
    optimizer = str(getattr(args.optim, "value", args.optim))
    fsdp = trainer.is_fsdp_enabled
    problems = {
        "DeepSpeed manages the gradients itself; use DDP": trainer.is_deepspeed_enabled,
        "fsdp: accelerate shards no model on the CPU and would use DDP instead; leave fsdp out": (
            args.fsdp and not fsdp
        ),
        "FSDP1 is not supported; set fsdp_config={'version': 2}": (
            fsdp and not trainer.accelerator.is_fsdp2
        ),
        "a model sharded while it is loaded (DistributedConfig) is not supported; load it "
        "unsharded and set fsdp=True": loaded_sharded(trainer),
        "torch_compile=True does not work with FSDP2, since the alignment pass runs uncompiled; "
        "leave one of them out": fsdp and args.torch_compile,
        "nn.DataParallel is not supported; start one process per GPU with torchrun, or make only "
        "one GPU visible (CUDA_VISIBLE_DEVICES)": args.n_gpu > 1,
        f"optim={optimizer!r} steps inside the backward pass, before gradients can be merged; use "
        "adamw_torch": "lomo" in optimizer or "layerwise" in optimizer,
        "auto_find_batch_size=True would restart in the middle of a step; set the batch size": (
            args.auto_find_batch_size
        ),
        "ddp_static_graph=True does not allow two different losses; leave it out": (
            static_graph(args)
        ),
    }
    rows = trainer.train_dataset
    problems |= {
        "train_dataset is empty": rows is not None and hasattr(rows, "__len__") and not len(rows),
        "no parameter of the model requires a gradient, so nothing would be trained; add adapters, "
        "load them with is_trainable=True, or unfreeze weights": not any(
            parameter.requires_grad for parameter in trainer.model.parameters()
        ),
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"gradsafe.SafeGradTrainer: {problem}")


def check_alignment(alignment_dataset: Any, safegrad: Any) -> None:
    """Raises TypeError or ValueError for unusable options or alignment rows."""
    if not isinstance(safegrad, (SafeGradConfig, type(None))):
        got = type(safegrad).__name__
        refuse("SafeGradTrainer", "safegrad to be a SafeGradConfig", got, kind=TypeError)
    if alignment_dataset is not None and not hasattr(alignment_dataset, "__len__"):
        expected = "alignment_dataset to have a length, since its rows are drawn repeatedly"
        got = type(alignment_dataset).__name__
        refuse("SafeGradTrainer", expected, got, "pass list(rows)", TypeError)
    if alignment_dataset is None or not len(alignment_dataset):
        raise ValueError(
            "gradsafe.SafeGradTrainer: expected alignment_dataset= with at least one row; "
            "recommended: about 100 unsafe prompts with refusals that resemble the expected harm"
        )

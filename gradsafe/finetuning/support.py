"""Checks of the trainer's setup before any work starts."""

from __future__ import annotations

from typing import Any

from gradsafe._checks import refuse
from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.models.compat import loaded_sharded, static_graph


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

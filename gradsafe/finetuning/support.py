"""What the trainer cannot work with, refused by name before anything is done."""

from __future__ import annotations

from typing import Any

from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.models.compat import loaded_sharded, static_graph


def check_supported(trainer: Any) -> None:
    """Raises ValueError for setups where gradients are not where the surgery looks for them."""
    args = trainer.args
    optimizer = str(getattr(args.optim, "value", args.optim))
    deepspeed, fsdp = trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled
    fsdp2 = trainer.accelerator.is_fsdp2
    problems = (
        (deepspeed, "DeepSpeed keeps the gradients to itself; use DDP"),
        (
            args.fsdp and not fsdp,
            "fsdp: accelerate shards no model on the CPU and would use DDP instead; leave fsdp out",
        ),
        (fsdp and not fsdp2, "FSDP1 is not supported; set fsdp_config={'version': 2}"),
        (
            loaded_sharded(trainer),
            "a model sharded while it is loaded (DistributedConfig) is not supported; load it "
            "whole and set fsdp=True",
        ),
        (
            fsdp and args.torch_compile,
            "torch_compile=True does not go with FSDP2 here, since the alignment pass runs "
            "uncompiled; leave one of them out",
        ),
        (
            args.n_gpu > 1,
            "nn.DataParallel is not supported; start one process per GPU with torchrun, or show "
            "one GPU only (CUDA_VISIBLE_DEVICES)",
        ),
        (
            "lomo" in optimizer or "layerwise" in optimizer,
            f"optim={optimizer!r} steps inside the backward pass, before gradients can be merged; "
            "use adamw_torch",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size=True would start over in the middle of a step; set the batch "
            "size",
        ),
        (
            static_graph(args),
            "ddp_static_graph=True does not fit two different losses; leave it out",
        ),
    )
    for found, problem in problems:
        if found:
            raise ValueError(f"gradsafe.SafeGradTrainer: {problem}")


def check_alignment(alignment_dataset: Any, safegrad: Any) -> None:
    """Raises TypeError or ValueError for what cannot be SafeGrad's options or alignment rows."""
    if not isinstance(safegrad, (SafeGradConfig, type(None))):
        raise TypeError(
            "gradsafe.SafeGradTrainer: expected safegrad to be a SafeGradConfig, got "
            f"{type(safegrad).__name__}"
        )
    if alignment_dataset is not None and not hasattr(alignment_dataset, "__len__"):
        raise TypeError(
            "gradsafe.SafeGradTrainer: expected alignment_dataset with a length, since its "
            f"rows are drawn again and again, got {type(alignment_dataset).__name__}; pass "
            "list(rows)"
        )
    if alignment_dataset is None or not len(alignment_dataset):
        raise ValueError(
            "gradsafe.SafeGradTrainer: expected alignment_dataset= with at least one row; "
            "about 100 unsafe prompts with refusals, in the style of the harm that is expected"
        )

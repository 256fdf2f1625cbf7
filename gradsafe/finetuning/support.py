"""Setups of the trainer in which the surgery would be wrong, refused by name."""

from __future__ import annotations

from typing import Any


def check_supported(trainer: Any) -> None:
    """Raises ValueError where gradients are not where the surgery looks for them."""
    args = trainer.args
    optimizer = str(getattr(args.optim, "value", args.optim))
    deepspeed, fsdp = trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled
    problems = (
        (deepspeed, "DeepSpeed keeps the gradients to itself; use DDP"),
        (
            fsdp,
            "FSDP is not supported here; use GradientSurgery with fully_shard in a loop of your "
            "own, or DDP",
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
            args.ddp_static_graph,
            "ddp_static_graph=True does not fit two different losses; leave it out",
        ),
    )
    for found, problem in problems:
        if found:
            raise ValueError(f"gradsafe.SafeGradTrainer: {problem}")

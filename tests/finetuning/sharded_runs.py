"""What the tests of the trainer under FSDP2 run in each process; spawned, so importable by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import finish, full, start

from gradsafe import SafeGradConfig, SafeGradTrainer

STEPS = 20
RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}


class CPUShardedTrainer(SafeGradTrainer):
    """Lets accelerate shard on the CPU.

    `AcceleratorState` makes its type FSDP only of the MULTI_ types of accelerators, never of
    MULTI_CPU; all that follows (fully_shard, checkpoints, gradients) is the same on the CPU.
    """

    def create_accelerator_and_postprocess(self) -> None:
        from accelerate.state import DistributedType, PartialState

        assert self.args.device.type == "cpu"  # the state exists
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def cases() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Model, options of the trainer, and `fsdp_config` by name."""
    from tiny_run import make_model

    no_wrap = {"auto_wrap_policy": "NO_WRAP"}  # all weights, the head's too, in one group
    head = make_model(targets=["q_proj", "lm_head"])
    cached = SafeGradConfig(reference="cached", kl_tokens="non_pad")
    second = SafeGradConfig(reference=make_model(lora=False))
    return {
        "adapters": (make_model(), {}, {}),
        "adapters in one group": (make_model(), {"safegrad": cached}, no_wrap),
        "adapter on the head": (head, {}, {}),
        "all weights": (make_model(lora=False), {"safegrad": second}, {}),
        "all weights, tied": (
            make_model(lora=False, tied=True),
            {"safegrad": SafeGradConfig(loss="sft")},
            {"reshard_after_forward": False},
        ),
    }


def make(folder: Path, model: Any, batch: int, **options: Any) -> Any:
    from tiny_run import make_trainer

    arguments = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.5, **options}
    return make_trainer(
        folder,
        model,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        **arguments,
    )


def sharded(folder: Path, model: Any, world: int, config: dict[str, Any], **options: Any) -> Any:
    return make(
        folder,
        model,
        batch=4 // world,
        **{"kind": CPUShardedTrainer, "ddp_backend": "gloo", "fsdp": True, **options},
        fsdp_config={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **config},
    )


def sharded_run(rank: int, world: int, folder: str) -> None:
    """Every case; a run that is resumed; what is refused."""
    start(rank, world, folder)
    from tiny_run import make_model

    saved: dict[str, Any] = {"refused": refusals(Path(folder), world)}
    for name, (model, options, config) in cases().items():
        trainer = sharded(Path(folder) / "run", model, world, config, **options)
        trainer.train()
        pieces = all(hasattr(p, "full_tensor") for p in trainer.model.parameters())
        saved[name] = (trained(trainer), losses(trainer), pieces)

    for name, checkpoint in (("whole", None), ("resumed", f"{folder}/saved/checkpoint-3")):
        model = make_model(dropout=0.3)
        trainer = sharded(Path(folder) / "saved", model, world, {}, **RESUMED)
        trainer.train(resume_from_checkpoint=checkpoint)
        saved[name] = trained(trainer)
    trainer.save_model(f"{folder}/adapter")
    saved["own loop"] = own_loop(world)
    torch.save(saved, f"{folder}/sharded{rank}.pt")
    finish()


def own_loop(world: int) -> dict[str, Any]:
    """The alignment loss as the first thing that a model sharded by hand ever computes."""
    from tiny_run import make_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from gradsafe.finetuning import KLAlignment

    mesh = init_device_mesh("cpu", (world,))
    model = make_model(targets=["q_proj", "lm_head"]).train()
    inner = model.base_model.model
    tail = [inner.model.norm, inner.lm_head]  # whose weights the backward pass must gather again
    for part in (*inner.model.layers, tail):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    loss = KLAlignment(model)(alignment_batch())
    loss.backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
    texts = []
    reference = make_model(lora=False)
    fully_shard(reference, mesh=mesh)
    try:
        KLAlignment(model, reference)(alignment_batch())
    except ValueError as error:
        texts.append(str(error))
    return {"loss": loss.detach(), "gradients": gradients, "refused": texts}


def alignment_batch() -> dict[str, torch.Tensor]:
    from tiny_run import ALIGNMENT

    from gradsafe.finetuning.rows import RowCollator

    return RowCollator(0)(ALIGNMENT[:5])


def refusals(folder: Path, world: int) -> dict[str, str]:
    from tiny_run import make_model

    def refusal(config: dict[str, Any], **options: Any) -> str:
        with pytest.raises(ValueError, match=r"gradsafe\.SafeGradTrainer") as caught:
            sharded(folder / "refused", make_model(), world, config, **options)
        return str(caught.value)

    return {
        "cpu": refusal({}, kind=SafeGradTrainer),
        "version": refusal({"version": 1, "sync_module_states": False}),
        "compile": refusal({}, torch_compile=True),
    }


def losses(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    named = dict(trainer.model.named_parameters())
    return {n: t.clone() for n, t in full(trainer.model).items() if named[n].requires_grad}

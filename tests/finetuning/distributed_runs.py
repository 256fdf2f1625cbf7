"""What the tests of several processes run in each of them; spawned, so importable by name."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS = 20
WORLD = 2
LONGEST_SECONDS = 300


def spawn(run: Callable[..., None], folder: Path, name: str) -> list[Any]:
    """What each of two processes saved as `name`."""
    started = torch.multiprocessing.spawn(run, (WORLD, str(folder)), nprocs=WORLD, join=False)
    end = time.monotonic() + LONGEST_SECONDS
    while not started.join(timeout=5):
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            pytest.fail(f"processes were not done after {LONGEST_SECONDS} seconds")
    return [torch.load(folder / f"{name}{rank}.pt") for rank in range(WORLD)]


def start(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    faulthandler.enable()  # an abort in C++ then says where
    # As torchrun sets them; the file store below needs no port.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    sys.path.insert(0, str(Path(__file__).parent))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )


def finish() -> None:
    """Ends the group; whoever calls it must hold no model in DDP any more.

    Its reducer would be the last owner of the group: it is freed under the interpreter's lock, and
    then waits for the threads of gloo, which may wait for that lock.
    """
    gc.collect()
    assert not any(isinstance(o, nn.parallel.DistributedDataParallel) for o in gc.get_objects())
    dist.barrier()  # no process takes its connections down while another one still computes
    dist.destroy_process_group()


def trainer_run(rank: int, world: int, folder: str) -> None:
    """The trainer under DDP, half of the batch in each process."""
    start(rank, world, folder)
    torch.save(trained(Path(folder) / "run", world), f"{folder}/trainer{rank}.pt")
    finish()


def sft_run(rank: int, world: int, folder: str) -> None:
    """The same over TRL's trainer."""
    start(rank, world, folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from builders import make_tokenizer
    from datasets import Dataset
    from tiny_run import USER

    from gradsafe import SafeGradSFTTrainer

    options = {
        "kind": SafeGradSFTTrainer,
        "processing_class": make_tokenizer(),
        "train_dataset": Dataset.from_list(USER),
    }
    torch.save(trained(Path(folder) / "run", world, **options), f"{folder}/sft{rank}.pt")
    finish()


def trained(folder: Path, world: int, **options: Any) -> Any:
    """Weights and history after training."""
    from tiny_run import weights

    trainer = trainer_for(folder, batch=4 // world, ddp_backend="gloo", **options)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: w.clone() for name, w in weights(trainer.model).items()}, history


def trainer_for(folder: Path, batch: int, **options: Any) -> Any:
    from tiny_run import make_trainer

    return make_trainer(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        optim="sgd",
        learning_rate=0.5,
        **options,
    )


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 17), nn.Tanh(), nn.Linear(17, 5, bias=False), nn.Linear(5, 3))


def losses(net: nn.Module, step: int, part: slice) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 9, generator=torch.Generator().manual_seed(step))[part]
    y = net(x)
    return (y - 1).square().mean(), (y + 1).square().mean() + y[:, 0].sin().mean()


def loop(net: nn.Module, surgery: Any, part: slice, bad: int | None = None) -> list[list[float]]:
    """Twenty steps of AdamW; in step `bad` the alignment loss is not finite."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.03)
    results = []
    for step in range(STEPS):
        losses(net, step, part)[0].backward()
        surgery.stash()
        align = losses(net, step, part)[1]
        (align * float("inf") if step == bad else align).backward()
        results.append(surgery.merge()[:, :4].tolist())
        optimizer.step()
        optimizer.zero_grad()
    return results


def loops_run(rank: int, world: int, folder: str) -> None:
    """DDP, FSDP2 with uneven and empty shards, and a mix of both, in loops of their own."""
    start(rank, world, folder)
    torch.save(loops(rank, world), f"{folder}/loops{rank}.pt")
    finish()


def loops(rank: int, world: int) -> dict[str, Any]:
    """Statistics and weights of every case."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from gradsafe import GradientSurgery

    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    mesh = init_device_mesh("cpu", (world,))
    saved: dict[str, Any] = {}

    net = make_net()
    wrapped = DistributedDataParallel(net)
    saved["ddp"] = (loop(wrapped, GradientSurgery(net.parameters()), part), full(net))

    for name, scope, bad in (
        ("fsdp", "global", None),
        ("layer", "layer", None),
        ("bad", "global", 7),
    ):
        net = make_net()
        fully_shard(net[2], mesh=mesh)
        fully_shard(net, mesh=mesh)
        surgery = GradientSurgery(net.named_parameters(), scope=scope)
        saved[name] = (loop(net, surgery, part, bad), full(net), surgery.skipped)

    # One part sharded, the others plain and reduced by hand: sums must not count them twice.
    net = make_net()
    fully_shard(net[0], mesh=mesh)
    for parameter in [*net[2].parameters(), *net[3].parameters()]:
        parameter.register_post_accumulate_grad_hook(average)
    saved["mixed"] = (loop(net, GradientSurgery(net.parameters()), part), full(net))

    net = DistributedDataParallel(make_net(), gradient_as_bucket_view=True)
    try:
        loop(net, GradientSurgery(net.parameters()), part)
    except ValueError as error:
        saved["bucket"] = str(error)
    return saved


def average(parameter: Tensor) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def full(net: nn.Module) -> dict[str, Tensor]:
    named = net.named_parameters()
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in named}

"""Computes what an index lacks: shard by shard, batch by batch, each kept at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradsafe._io.processes import Processes, SharedProgress
from gradsafe.models import Encoded, pad_token_id
from gradsafe.tracing.examples import Encoding, Example, ExampleEncoder
from gradsafe.tracing.folder import IndexFolder, Shard, ShardPlan, batch_key
from gradsafe.tracing.signature import SignaturePass, check_finite


def fill(
    folder: IndexFolder,
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    part: int,
    batch_tokens: int,
    progress: bool,
    processes: Processes,
) -> None:
    """Compute the missing shards of one part.

    A shard is computed by one process, in the batches that it always has, so its bytes depend
    neither on the number of processes nor on which of them gets it. The first process alone writes
    the manifest; the others tell it what they finished.

    Args:
        folder: The index, the same in all processes.
        model: The model it belongs to, whole in every process.
        tokenizer: Its tokenizer.
        examples: The samples of the part.
        part: Number of the part.
        batch_tokens: Padded tokens per batch. A build that goes on with another value computes the
            unfinished shards anew, and their rows agree with the others to rounding only.
        progress: Show a bar over the samples, in the first process.
        processes: The processes, all of which call this.
    """
    if processes.first:
        folder.sweep()
    before = sum(entry["count"] for entry in folder.metadata["parts"][:part])
    wanted = [s for s in folder.missing if before <= s.first < before + len(examples)]
    if not wanted:
        return
    processes.wait("the folder is swept")
    encode = ExampleEncoder(model, tokenizer, Encoding(**folder.metadata["settings"]["encoding"]))
    runner = SignaturePass(model, [folder.metadata["layer"]], pad_token_id(tokenizer))
    left = sum(shard.count for shard in wanted)
    with tqdm(
        total=len(examples),
        initial=len(examples) - left,
        desc="signatures",
        unit="sample",
        disable=not (progress and processes.first),
    ) as bar:
        shared = SharedProgress(bar, processes, "samples")

        def show(samples: int = 0) -> None:
            processes.check()
            shared(samples)

        def list_finished() -> None:
            show()
            if processes.first and (told := processes.heard()):
                folder.list_shards(dict(told))

        for plan in processes.deal(wanted):
            own = examples[plan.first - before : plan.first - before + plan.count]
            items, owners = encode.all(own)
            names = [own[owner].where for owner in owners]
            values = _signatures(folder, plan, runner, items, names, batch_tokens, show)
            shard = Shard(
                values, torch.tensor(owners) + plan.first, [example.id for example in own], items
            )
            processes.tell([plan.name, folder.write_shard(plan, shard)])
            list_finished()
        processes.wait("all shards are written", list_finished)
        list_finished()
    folder.files = processes.share("files", folder.files)


def _signatures(
    folder: IndexFolder,
    plan: ShardPlan,
    runner: SignaturePass,
    items: list[Encoded],
    names: list[str],
    batch_tokens: int,
    show: Callable[[int], None],
) -> Tensor:
    samples = f"{plan} {folder.metadata['parts']}"
    signatures: Tensor | None = None
    counted = 0
    done = 0
    for number, indices in enumerate(runner.plan(items, batch_tokens)):
        key = batch_key(indices, samples)
        values = folder.read_batch(plan, number, key)
        if values is None:
            (values,) = runner.batch([items[i] for i in indices]).values()
            values = values.float().contiguous()
            check_finite(values, [names[i] for i in indices])
            folder.write_batch(plan, number, key, values)
        if signatures is None:
            signatures = torch.empty(len(items), values.shape[1])
        signatures[indices] = values
        done += len(indices)
        # Windows of one sample are rows of their own; the bar counts samples.
        reached = plan.count * done // len(items)
        show(reached - counted)
        counted = reached
    assert signatures is not None
    return signatures

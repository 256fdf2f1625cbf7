"""Computes the missing shards of an index, batch by batch; each batch is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradsafe._io.processes import Processes, SharedProgress
from gradsafe.models import Encoded, pad_token_id
from gradsafe.tracing.config import check_count
from gradsafe.tracing.examples import Example, ExampleEncoder
from gradsafe.tracing.folder import IndexFolder, Shard, ShardPlan, batch_key
from gradsafe.tracing.signature import SignaturePass, check_finite


@dataclass(frozen=True)
class Job:
    """The model, its tokenizer and the settings of one call of `build` or `extend`."""

    model: nn.Module
    tokenizer: Any
    processes: Processes
    batch_tokens: int
    progress: bool

    @classmethod
    @contextmanager
    def started(
        cls,
        model: nn.Module,
        tokenizer: Any,
        processes: Processes | None,
        batch_tokens: int,
        progress: bool,
    ) -> Iterator[Job]:
        """Yields the job of these processes; a failure in one of them ends the others."""
        check_count("batch_tokens", batch_tokens)
        processes = Processes.of_group() if processes is None else processes
        processes.next_job()
        with processes.ending_together():
            yield cls(model, tokenizer, processes, batch_tokens, progress)


def fill(
    job: Job, folder: IndexFolder, examples: Sequence[Example], part: int, encode: ExampleEncoder
) -> None:
    """Compute the missing shards of one part.

    One process computes a shard, in batches that depend on the shard alone, so its bytes do not
    depend on the number of processes. The first process alone writes the manifest; the others send
    it the checksums of their shards. With another `batch_tokens` than before, unfinished shards are
    computed from their start, and their rows agree with the others to rounding only.

    Args:
        job: All processes call this.
        folder: The index, the same in all processes.
        examples: The samples of the part.
        part: Number of the part.
        encode: Encodes them.
    """
    processes = job.processes
    if processes.first:
        folder.sweep()
    before = sum(entry["count"] for entry in folder.metadata["parts"][:part])
    wanted = [s for s in folder.missing if before <= s.first < before + len(examples)]
    if not wanted:
        return
    processes.wait("the folder is swept")
    runner = SignaturePass(job.model, [folder.metadata["layer"]], pad_token_id(job.tokenizer))
    with tqdm(
        total=len(examples),
        initial=len(examples) - sum(shard.count for shard in wanted),
        desc="signatures",
        unit="sample",
        disable=not (job.progress and processes.first),
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
            own = examples[plan.first - before :][: plan.count]
            items, owners = encode.all(own)
            names = [own[owner].where for owner in owners]
            values = _signatures(folder, plan, runner, items, names, job.batch_tokens, show)
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
    rows: list[Tensor] = [torch.empty(0)] * len(items)
    done = shown = 0
    for number, indices in enumerate(runner.plan(items, batch_tokens)):
        key = batch_key(indices, samples)
        values = folder.read_batch(plan, number, key)
        if values is None:
            (values,) = runner.batch([items[i] for i in indices]).values()
            values = values.float().contiguous()
            check_finite(values, [names[i] for i in indices])
            folder.write_batch(plan, number, key, values)
        for index, row in zip(indices, values, strict=True):
            rows[index] = row
        done += len(indices)
        # A sample that was cut into windows has several items; the bar counts samples.
        reached = plan.count * done // len(items)
        show(reached - shown)
        shown = reached
    return torch.stack(rows)

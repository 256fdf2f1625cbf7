"""Computes the missing shards of an index, batch by batch; each batch is kept at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradsafe._checks import check_fields
from gradsafe._io.processes import Processes, SharedProgress
from gradsafe.models import Encoded, pad_token_id
from gradsafe.tracing.examples import Example, ExampleEncoder
from gradsafe.tracing.folder import IndexFolder, Shard, ShardPlan
from gradsafe.tracing.signature import SignaturePass, check_finite


@dataclass(frozen=True)
class Job:
    """The model, its tokenizer and the settings of one call of `build` or `extend`."""

    model: nn.Module
    tokenizer: Any
    batch_tokens: int
    progress: bool
    processes: Processes

    def __post_init__(self) -> None:
        check_fields("TraceIndex", self, {"batch_tokens": 1})
        self.processes.next_job()


def fill(
    job: Job, folder: IndexFolder, examples: Sequence[Example], part: int, encode: ExampleEncoder
) -> None:
    """Compute the missing shards of one part.

    One process computes a shard, in batches that depend on the shard alone, so its bytes do not
    depend on the number of processes. The first process alone writes the manifest; the others send
    it the checksums of their shards. With another `batch_tokens` than before, unfinished shards are
    computed from their start, and their rows agree with the others to rounding only.
    """
    processes = job.processes
    if processes.first:
        folder.sweep()
    before = sum(entry["count"] for entry in folder.metadata["parts"][:part])
    wanted = [s for s in folder.missing if before <= s.first < before + len(examples)]
    if not wanted:
        return
    processes.wait("the folder is swept")
    pad_id = pad_token_id(job.tokenizer, job.model)
    runner = SignaturePass(job.model, [folder.metadata["layer"]], pad_id)
    with tqdm(
        total=len(examples),
        initial=len(examples) - sum(shard.count for shard in wanted),
        desc="signatures",
        unit="sample",
        disable=not (job.progress and processes.first),
    ) as bar:
        shared = SharedProgress(bar, processes, "samples")

        def show(samples: int) -> None:
            processes.check()
            shared(samples)

        def list_finished() -> None:
            show(0)
            if processes.first and (told := processes.heard()):
                folder.list_shards(dict(told))

        for plan in processes.deal(wanted):
            own = examples[plan.first - before :][: plan.count]
            items, owners = encode.all(own)
            names = [own[owner].where for owner in owners]
            rows: list[Tensor] = [torch.empty(0, dtype=torch.float32)] * len(items)
            done = shown = 0
            for indices, values in _signatures(job, folder, plan, runner, items, names):
                for index, row in zip(indices, values, strict=True):
                    rows[index] = row
                done += len(indices)
                # A sample may have several items; the bar counts samples.
                show(plan.count * done // len(items) - shown)
                shown = plan.count * done // len(items)
            ids = [example.id for example in own]
            shard = Shard(torch.stack(rows), torch.tensor(owners) + plan.first, ids, items)
            processes.tell([plan.name, folder.write_shard(plan, shard)])
            list_finished()
        processes.wait("all shards are written", list_finished)
        list_finished()
    folder.files = processes.share("files", folder.files)


def _signatures(
    job: Job,
    folder: IndexFolder,
    plan: ShardPlan,
    runner: SignaturePass,
    items: list[Encoded],
    names: list[str],
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers and signatures of the items of each batch, computed or from an earlier run."""
    for number, indices in enumerate(runner.plan(items, job.batch_tokens)):
        rows = f"{plan} {folder.metadata['parts']} {indices}"
        key = hashlib.sha256(rows.encode()).hexdigest()
        values = folder.read_batch(plan, number, key)
        if values is None:
            (values,) = runner.batch([items[i] for i in indices]).values()
            values = values.float().contiguous()
            check_finite(values, [names[i] for i in indices])
            folder.write_batch(plan, number, key, values)
        yield indices, values

"""Fills an index: shard by shard, batch by batch, each kept at once, so a killed build goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradsafe.models import Encoded, pad_token_id
from gradsafe.storage import StorageError, model_fingerprint, tokenizer_fingerprint
from gradsafe.tracing.examples import Encoding, Example, ExampleEncoder, examples_fingerprint
from gradsafe.tracing.folder import IndexFolder, Shard, ShardPlan, batch_key
from gradsafe.tracing.layer_choice import RULES, choose_layer, pick_probes
from gradsafe.tracing.matching import PartNorm
from gradsafe.tracing.signature import SignaturePass, check_finite, resolve_layer

SHARD_SAMPLES = 1024


def settings_of(
    model: nn.Module, tokenizer: Any, layer: int | str, encoding: Encoding
) -> dict[str, Any]:
    """Everything that signatures depend on, except the samples."""
    return {
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "layer": layer if layer in RULES else resolve_layer(model, layer),  # type: ignore[arg-type]
        "encoding": encoding.to_json(),
    }


def new_metadata(
    settings: dict[str, Any],
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    part_norm: PartNorm,
    shard_samples: int,
    batch_tokens: int,
) -> dict[str, Any]:
    """The manifest of an index that has no shard yet; chooses the layer if asked to."""
    layer, curve = settings["layer"], None
    if layer in RULES:
        encode = ExampleEncoder(model, tokenizer, Encoding(**settings["encoding"]))
        probes = [encode(examples[i])[-1] for i in pick_probes(len(examples))]
        choice = choose_layer(model, probes, pad_token_id(tokenizer), layer, batch_tokens)
        layer, curve = choice.layer, choice.curve
    return {
        "settings": settings,
        "layer": layer,
        "layer_curve": curve,
        "part_norm": part_norm,
        "shard_samples": shard_samples,
        "parts": [new_part(examples)],
    }


def new_part(examples: Sequence[Example]) -> dict[str, Any]:
    """What the manifest says of one set of samples."""
    return {"examples": examples_fingerprint(examples), "count": len(examples)}


def check_settings(folder: IndexFolder, given: dict[str, Any], op: str) -> None:
    """Refuse to mix signatures of two settings.

    Raises:
        ValueError: Names the setting, what the index has and what was given.
    """
    saved = folder.metadata["settings"]
    for name, value in given.items():
        if saved.get(name) == value:
            continue
        raise ValueError(
            f"gradsafe.TraceIndex.{op}: {folder.path} was built with another {name} (it has "
            f"{_short(saved.get(name))}, given {_short(value)}); use what it was built with, or "
            "build in another folder"
        )


def reopen(path: Path, resume: bool) -> IndexFolder:
    """Open a folder to go on with.

    Raises:
        FileExistsError: It holds something else, or an index and `resume` is False.
        StorageError: A shard is damaged.
    """
    try:
        folder = IndexFolder.open(path)
    except StorageError as error:
        raise FileExistsError(f"cannot build {path}: {error}; choose another path") from error
    if not resume:
        raise FileExistsError(
            f"cannot build {path}: an index is there; pass resume=True to go on with it, or choose "
            "another path"
        )
    folder.verify()
    return folder


def check_examples(folder: IndexFolder, examples: Sequence[Example]) -> None:
    """Refuse to go on with other samples than a build was started with.

    Raises:
        ValueError: With both fingerprints.
    """
    part = folder.metadata["parts"][0]
    given = examples_fingerprint(examples)
    if part["examples"] != given:
        raise ValueError(
            f"gradsafe.TraceIndex.build: {folder.path} was started with other examples "
            f"(fingerprint {part['examples'][:16]}, {part['count']} samples; given {given[:16]}, "
            f"{len(examples)} samples); use those, add new ones with extend, or build in another "
            "folder"
        )


def fill(
    folder: IndexFolder,
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    part: int,
    batch_tokens: int,
    progress: bool,
) -> None:
    """Compute the missing shards of one part.

    Args:
        folder: The index.
        model: The model it belongs to.
        tokenizer: Its tokenizer.
        examples: The samples of the part.
        part: Number of the part.
        batch_tokens: Padded tokens per batch. A build that goes on with another value computes the
            unfinished shard anew, and its rows agree with the others to rounding only.
        progress: Show a bar over the samples.
    """
    folder.sweep()
    before = sum(entry["count"] for entry in folder.metadata["parts"][:part])
    wanted = [s for s in folder.missing if before <= s.first < before + len(examples)]
    if not wanted:
        return
    encode = ExampleEncoder(model, tokenizer, Encoding(**folder.metadata["settings"]["encoding"]))
    for example in examples:  # a sample that does not fit is found now, not hours into the build
        encode(example)
    pad_id = pad_token_id(tokenizer)
    runner = SignaturePass(model, [folder.metadata["layer"]], pad_id)
    left = sum(shard.count for shard in wanted)
    with tqdm(
        total=len(examples),
        initial=len(examples) - left,
        desc="signatures",
        unit="sample",
        disable=not progress,
    ) as bar:
        for plan in wanted:
            own = examples[plan.first - before : plan.first - before + plan.count]
            items, owners = encode.all(own)
            names = [own[owner].where for owner in owners]
            values = _shard(folder, plan, runner, items, names, batch_tokens, bar)
            shard = Shard(
                values, torch.tensor(owners) + plan.first, [example.id for example in own], items
            )
            folder.finish(plan, shard)


def _shard(
    folder: IndexFolder,
    plan: ShardPlan,
    runner: SignaturePass,
    items: list[Encoded],
    names: list[str],
    batch_tokens: int,
    bar: Any,
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
        bar.update(reached - counted)
        counted = reached
    assert signatures is not None
    return signatures


def _short(value: Any) -> str:
    """Fingerprints by their first digits, other settings in full."""
    text = str(value)
    return f"fingerprint {text[:16]}" if isinstance(value, str) and len(text) == 64 else text

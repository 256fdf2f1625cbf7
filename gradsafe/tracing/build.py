"""Starts, goes on with and extends an index; refuses to mix two models, layers or sample sets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gradsafe._io.artifacts import StorageError
from gradsafe._io.fingerprints import model_fingerprint, tokenizer_fingerprint
from gradsafe._io.processes import Processes
from gradsafe.models import pad_token_id
from gradsafe.models.inspection import input_device
from gradsafe.tracing.examples import (
    Encoding,
    Example,
    ExampleEncoder,
    Samples,
    examples_fingerprint,
    read_examples,
)
from gradsafe.tracing.fill import fill
from gradsafe.tracing.folder import IndexFolder, is_blank
from gradsafe.tracing.layer_choice import RULES, choose_layer, pick_probes
from gradsafe.tracing.lock import building_alone
from gradsafe.tracing.matching import Metric, PartNorm
from gradsafe.tracing.signature import resolve_layer

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
    part_norm: PartNorm | None,
    shard_samples: int | None,
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
        "part_norm": Metric().part_norm if part_norm is None else part_norm,
        "shard_samples": SHARD_SAMPLES if shard_samples is None else shard_samples,
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
        what = "model or dtype" if name == "model" else name
        raise ValueError(
            f"gradsafe.TraceIndex.{op}: {folder.path} was built with another {what} (it has "
            f"{_short(saved.get(name))}, given {_short(value)}); use what it was built with, or "
            "build in another folder"
        )


def reopen(path: Path, resume: bool) -> IndexFolder:
    """Open a folder to go on with.

    Raises:
        FileExistsError: It holds something else, or an index and `resume` is False.
    """
    if not path.is_dir():
        raise FileExistsError(f"cannot build {path}: it is not a folder; choose another path")
    try:
        folder = IndexFolder.open(path)
    except StorageError as error:
        raise FileExistsError(f"cannot build {path}: {error}; choose another path") from error
    if not resume:
        raise FileExistsError(
            f"cannot build {path}: an index is there; pass resume=True to go on with it, or choose "
            "another path"
        )
    return folder


def check_place(path: Path, resume: bool) -> None:
    """Raises what a build into `path` would raise about the folder, and touches nothing.

    Raises:
        FileNotFoundError: The parent folder does not exist.
        FileExistsError: As `reopen`.
    """
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"cannot build {path}: no such folder {path.parent}")
    if path.exists() and not is_blank(path):
        reopen(path, resume)


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


def _check_shard_samples(folder: IndexFolder, given: int | None) -> None:
    own = folder.metadata["shard_samples"]
    if given not in (None, own):
        raise ValueError(
            f"gradsafe.TraceIndex.build: {folder.path} has {own} samples per file, given {given}; "
            "leave shard_samples out, or build in another folder"
        )


def build_folder(
    model: nn.Module,
    tokenizer: Any,
    source: Samples,
    place: Path,
    processes: Processes,
    *,
    layer: int | str,
    part_norm: PartNorm | None,
    resume: bool,
    batch_tokens: int,
    progress: bool,
    shard_samples: int | None,
    encoding: Encoding,
) -> IndexFolder:
    """Start or reopen an index and complete it, see `TraceIndex.build`."""
    samples = read_examples(source)
    settings = settings_of(model, tokenizer, layer, encoding)
    asked = {**settings, "part_norm": part_norm, "batch_tokens": batch_tokens}
    _check_agreement(processes, model, samples, asked)
    if not place.exists() or is_blank(place):
        _check_lengths(model, tokenizer, encoding, samples[processes.rank :: processes.count])
    if processes.first:
        check_place(place, resume)  # nothing is put into a folder that is not ours
    with building_alone(place, processes):
        folder = None
        if processes.first and not is_blank(place):
            folder = reopen(place, resume)
            folder.verify()
            check_settings(folder, settings, "build")
            check_examples(folder, samples)
            _check_shard_samples(folder, shard_samples)
            if part_norm is not None:
                folder.metadata["part_norm"] = part_norm
                folder.write_manifest()
        elif processes.first:
            metadata = new_metadata(
                settings, model, tokenizer, samples, part_norm, shard_samples, batch_tokens
            )
            folder = IndexFolder.create(place, metadata)
        folder = _shared(processes, folder, place)
        fill(folder, model, tokenizer, samples, 0, batch_tokens, progress, processes)
    return folder


def extend_folder(
    folder: IndexFolder,
    model: nn.Module,
    tokenizer: Any,
    source: Samples,
    processes: Processes,
    batch_tokens: int,
    progress: bool,
) -> IndexFolder:
    """Add samples, or take up a call that was killed, see `TraceIndex.extend`.

    Returns:
        The index as it is then; others may have extended it since `folder` was read.
    """
    if not isinstance(source, (str, os.PathLike)):
        source = list(source)
    with building_alone(folder.path, processes):
        fresh = None
        if processes.first:
            fresh = IndexFolder.open(folder.path)
            check_settings(fresh, folder.metadata["settings"], "extend")
        folder = _shared(processes, fresh, folder.path)
        samples, part = _next_part(folder, model, tokenizer, source)
        _check_agreement(processes, model, samples, {"batch_tokens": batch_tokens})
        if part == len(folder.metadata["parts"]):
            folder.metadata["parts"].append(new_part(samples))
            if processes.first:
                folder.write_manifest()
        fill(folder, model, tokenizer, samples, part, batch_tokens, progress, processes)
    return folder


def _next_part(
    folder: IndexFolder, model: nn.Module, tokenizer: Any, source: Samples
) -> tuple[list[Example], int]:
    """The samples, and the number of their part: a new one, or that of a call that was killed."""
    parts = folder.metadata["parts"]
    first = 0
    for number, part in enumerate(parts):
        again = read_examples(source, first=first) if number else []
        if again and new_part(again) == part:
            return again, number
        first += part["count"]
    if folder.missing:
        raise ValueError(
            f"gradsafe.TraceIndex.extend: {folder.path} is incomplete; first finish it with the "
            f"samples it was started with, or drop an extension of which nothing is complete: "
            f"gradsafe.TraceIndex.repair({str(folder.path)!r})"
        )
    taken = [name for shard in folder.present for name in folder.read_ids(shard)[0]]
    samples = read_examples(source, first=first, taken=taken)
    encoding = Encoding(**folder.metadata["settings"]["encoding"])
    _check_lengths(model, tokenizer, encoding, samples)
    return samples, len(parts)


def _check_lengths(
    model: nn.Module, tokenizer: Any, encoding: Encoding, samples: Sequence[Example]
) -> None:
    """Raises what encoding a sample raises, before a manifest promises it."""
    encode = ExampleEncoder(model, tokenizer, encoding)
    for sample in samples:
        encode(sample)


def _shared(processes: Processes, folder: IndexFolder | None, place: Path) -> IndexFolder:
    """The first process's folder, as all of them are to see it; the layer above all.

    Raises:
        StorageError: This process does not see the folder.
    """
    mine = [folder.metadata, folder.files] if folder is not None else None
    metadata, files = processes.share("folder", mine)
    if folder is not None:
        return folder
    try:
        IndexFolder.open(place)
    except StorageError as error:
        raise StorageError(
            f"process {processes.rank}: {error}; all processes must see one shared folder"
        ) from error
    return IndexFolder(place, metadata, files)


def _check_agreement(
    processes: Processes, model: nn.Module, samples: Sequence[Example], asked: Mapping[str, Any]
) -> None:
    """Raises ValueError if this process would compute other signatures than the first."""
    device = input_device(model)
    mine = {**asked, "device": device and device.type, "examples": examples_fingerprint(samples)}
    for name, value in processes.share("job", mine).items():
        if mine[name] != value:
            raise ValueError(
                f"gradsafe.TraceIndex: process {processes.rank} has another {name} (process 0 has "
                f"{_short(value)}, this one {_short(mine[name])}); all need the same"
            )


def _short(value: Any) -> str:
    """Fingerprints by their first digits, other settings in full."""
    text = str(value)
    return f"fingerprint {text[:16]}" if isinstance(value, str) and len(text) == 64 else text

"""Starts, resumes and extends an index; refuses to mix two models, layers or sets of samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from gradsafe._io.artifacts import StorageError
from gradsafe._io.fingerprints import model_fingerprint, tokenizer_fingerprint
from gradsafe._io.records import read_jsonl
from gradsafe.models import Encoding, pad_token_id
from gradsafe.models.inspection import input_device
from gradsafe.tracing.config import RULES, TraceConfig
from gradsafe.tracing.examples import (
    Example,
    ExampleEncoder,
    Samples,
    examples_fingerprint,
    read_examples,
)
from gradsafe.tracing.fill import Job, fill
from gradsafe.tracing.folder import IndexFolder, is_blank
from gradsafe.tracing.layer_choice import choose_layer, pick_probes
from gradsafe.tracing.lock import building_alone
from gradsafe.tracing.matching import Metric
from gradsafe.tracing.signature import resolve_layer

SHARD_SAMPLES = 1024


def build_folder(
    job: Job, source: Samples, place: Path, config: TraceConfig, resume: bool
) -> IndexFolder:
    """Start or reopen an index and complete it, see `TraceIndex.build`."""
    samples = read_examples(source)
    layer = config.layer
    settings = {
        **model_settings(job.model, job.tokenizer),
        "layer": layer if layer in RULES else resolve_layer(job.model, layer),  # type: ignore[arg-type]
        "encoding": asdict(config.encoding),
    }
    _check_agreement(job, samples, {**settings, "part_norm": config.part_norm})
    encode = ExampleEncoder(job.model, job.tokenizer, config.encoding)
    if not place.exists() or is_blank(place):
        encode.keep(samples[job.processes.rank :: job.processes.count])
    if job.processes.first:
        check_place(place, resume)  # before a lock is put into it
    with building_alone(place, job.processes):
        folder = None
        if job.processes.first:
            folder = check_place(place, resume)
            if folder is None:
                metadata = _new_metadata(job, samples, config, settings, encode)
                folder = IndexFolder.create(place, metadata)
            else:
                folder.verify()
                given = {**settings, "examples": _new_part(samples)}
                if config.shard_samples is not None:
                    given["shard_samples"] = config.shard_samples
                check_settings(folder, given, "build")
                if config.part_norm is not None:
                    folder.metadata["part_norm"] = config.part_norm
                    folder.write_manifest()
        folder = _in_all(job, folder, place)
        fill(job, folder, samples, 0, encode)
    return folder


def extend_folder(job: Job, known: IndexFolder, source: Samples) -> IndexFolder:
    """Add samples, or resume a call that was killed, see `TraceIndex.extend`.

    Others may have extended the index since `known` was read; the one returned is read anew.
    """
    source = read_jsonl(source) if isinstance(source, (str, os.PathLike)) else list(source)
    with building_alone(known.path, job.processes):
        folder = None
        if job.processes.first:
            folder = IndexFolder.open(known.path)
            settings = known.metadata["settings"] | model_settings(job.model, job.tokenizer)
            check_settings(folder, settings, "extend")
        folder = _in_all(job, folder, known.path)
        samples, part = _next_part(folder, source)
        _check_agreement(job, samples, {})
        encoding = Encoding(**folder.metadata["settings"]["encoding"])
        encode = ExampleEncoder(job.model, job.tokenizer, encoding)
        if part == len(folder.metadata["parts"]):
            encode.keep(samples[job.processes.rank :: job.processes.count])
            job.processes.wait("the samples are encoded")
            folder.metadata["parts"].append(_new_part(samples))
            if job.processes.first:
                folder.write_manifest()
        fill(job, folder, samples, part, encode)
    return folder


def model_settings(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """The fingerprints of a model and its tokenizer."""
    return {"model": model_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer)}


def check_settings(folder: IndexFolder, given: Mapping[str, Any], op: str) -> None:
    """Raises ValueError, with both values, if an index was built with other settings."""
    known = {
        **folder.metadata["settings"],
        "examples": folder.metadata["parts"][0],
        "shard_samples": folder.metadata["shard_samples"],
    }
    for name, value in given.items():
        if name == "encoding":  # an index of an earlier version lacks newer options
            value, known[name] = ({**asdict(Encoding()), **part} for part in (value, known[name]))
        if known.get(name) != value:
            raise ValueError(
                f"gradsafe.TraceIndex.{op}: expected the {name} that {folder.path} was built with "
                f"({_short(known.get(name))}), got {_short(value)}; use the same {name}"
                f"{' and dtype' * (name == 'model')}"
                f"{', add new samples with extend' * (name == 'examples')}, or build in another "
                "folder"
            )


def check_place(path: Path, resume: bool) -> IndexFolder | None:
    """The index in a folder, None if there is none; call it before long work, it writes nothing.

    Raises:
        FileNotFoundError: The parent folder does not exist.
        FileExistsError: The folder holds something else, or an index and `resume` is False.
    """
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"cannot build {path}: no such folder {path.parent}")
    if not path.exists() or is_blank(path):
        return None
    if not path.is_dir():
        raise FileExistsError(f"cannot build {path}: it is not a folder; choose another path")
    try:
        folder = IndexFolder.open(path)
    except StorageError as error:
        raise FileExistsError(f"cannot build {path}: {error}; choose another path") from error
    if not resume:
        raise FileExistsError(
            f"cannot build {path}: it holds an index; pass resume=True to continue it, or choose "
            "another path"
        )
    return folder


def _new_metadata(
    job: Job,
    samples: Sequence[Example],
    config: TraceConfig,
    settings: dict[str, Any],
    encode: ExampleEncoder,
) -> dict[str, Any]:
    """The manifest of an index without shards; chooses the layer if asked to."""
    layer, curve = settings["layer"], None
    if layer in RULES:
        probes = [encode(samples[i])[-1] for i in pick_probes(len(samples))]
        pad_id = pad_token_id(job.tokenizer, job.model)
        choice = choose_layer(job.model, probes, pad_id, layer, job.batch_tokens)
        layer, curve = choice.layer, choice.curve
    return {
        "settings": settings,
        "layer": layer,
        "layer_curve": curve,
        "part_norm": config.part_norm or Metric().part_norm,
        "shard_samples": config.shard_samples or SHARD_SAMPLES,
        "parts": [_new_part(samples)],
    }


def _new_part(samples: Sequence[Example]) -> dict[str, Any]:
    """The manifest's entry for one set of samples."""
    return {"examples": examples_fingerprint(samples), "count": len(samples)}


def _next_part(folder: IndexFolder, source: Samples) -> tuple[list[Example], int]:
    """The samples and the number of their part: a new part, or that of a call that was killed."""
    parts = folder.metadata["parts"]
    first = parts[0]["count"]
    for number, part in enumerate(parts[1:], start=1):
        samples = read_examples(source, first=first)
        if _new_part(samples) == part:
            return samples, number
        first += part["count"]
    if folder.missing:
        raise ValueError(
            f"gradsafe.TraceIndex.extend: {folder.path} is incomplete; first finish it with the "
            f"samples it was started with, or drop an extension without a complete shard: "
            f"gradsafe.TraceIndex.repair({str(folder.path)!r})"
        )
    taken = [name for shard in folder.present for name in folder.ids(shard)[0]]
    return read_examples(source, first=first, taken=taken), len(parts)


def _in_all(job: Job, folder: IndexFolder | None, place: Path) -> IndexFolder:
    """The first process's folder, in all processes."""
    mine = None if folder is None else [folder.metadata, folder.files]
    metadata, files = job.processes.share("folder", mine)
    if folder is not None:
        return folder
    try:
        IndexFolder.open(place)
    except StorageError as error:
        raise StorageError(
            f"process {job.processes.rank}: {error}; all processes must see one shared folder"
        ) from error
    return IndexFolder(place, metadata, files)


def _check_agreement(job: Job, samples: Sequence[Example], settings: Mapping[str, Any]) -> None:
    """Raises ValueError if this process would compute other signatures than the first."""
    device = input_device(job.model)
    mine = {
        **settings,
        "batch_tokens": job.batch_tokens,
        "device": device and device.type,
        "examples": _new_part(samples),
    }
    for name, value in job.processes.share("job", mine).items():
        if mine[name] != value:
            raise ValueError(
                f"gradsafe.TraceIndex: expected the {name} of process 0 ({_short(value)}) in all "
                f"processes, got {_short(mine[name])} in process {job.processes.rank}; pass the "
                "same to all"
            )


def _short(value: Any) -> str:
    """Fingerprints by their first digits, other settings in full."""
    if isinstance(value, dict) and "count" in value:
        return f"{_short(value['examples'])}, {value['count']} samples"
    text = str(value)
    return f"fingerprint {text[:16]}" if isinstance(value, str) and len(text) == 64 else text

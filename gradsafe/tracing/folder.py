"""The folder of an index: a manifest, shards, and the batches of shards that are being built."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradsafe._io.artifacts import (
    MANIFEST,
    StorageError,
    check_destination,
    checked,
    file_record,
    flush_to_disk,
    is_partial,
    read_manifest,
    replacing_folder,
    verify_file,
    write_manifest,
    write_tensors,
)
from gradsafe._io.processes import Processes
from gradsafe.models import Encoded
from gradsafe.models.encoding import Encoding
from gradsafe.tracing.config import PartNorm
from gradsafe.tracing.examples import Id
from gradsafe.tracing.lock import LOCK, building_alone

KIND = "trace-index"
WORK = ".work-"  # begins the name of a folder with the batches of an unfinished shard
FAISS = "faiss-"  # begins the names of the files of `approximate`
SHARDS = 1_000_000  # more than any index has

_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    examples: _Digest
    count: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class _Settings(msgspec.Struct, forbid_unknown_fields=True):
    model: _Digest
    tokenizer: _Digest
    layer: int | Literal["last", "auto", "auto-lower", "auto-single"]
    encoding: Encoding


class _Metadata(msgspec.Struct, forbid_unknown_fields=True):
    """The metadata of the manifest, as `IndexFolder.open` accepts them."""

    settings: _Settings
    layer: Annotated[int, msgspec.Meta(ge=0)]
    layer_curve: list[float] | None
    part_norm: PartNorm
    shard_samples: Annotated[int, msgspec.Meta(ge=1)]
    parts: Annotated[list[_Part], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class ShardPlan:
    """The samples of a shard, `[first, first + count)`, and its file."""

    name: str
    first: int
    count: int


class Shard(NamedTuple):
    """Contents of one shard of R rows; a sample that was cut into windows has several rows.

    Attributes:
        signatures: `[R, 2d]` float32, as computed.
        owners: `[R]` int64, number of the sample of each row.
        ids: Ids of its samples, in order.
        items: Token ids of each row.
    """

    signatures: Tensor
    owners: Tensor
    ids: list[Id]
    items: list[Encoded]


class IndexFolder:
    """Reads and writes the folder; every file appears whole or not at all.

    Attributes:
        path: The folder.
        metadata: JSON values of the manifest; `write_manifest` saves changes.
        files: Name to checksum of every complete shard.
    """

    def __init__(
        self, path: Path, metadata: dict[str, Any], files: dict[str, dict[str, Any]]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.files = files

    @classmethod
    def create(cls, path: Path, metadata: dict[str, Any]) -> IndexFolder:
        """Write the manifest of a new index."""
        path.mkdir(exist_ok=True)
        folder = cls(path, metadata, {})
        folder.write_manifest()
        return folder

    @classmethod
    def open(cls, path: Path) -> IndexFolder:
        """Read the manifest, and no shard; raises StorageError if that is impossible."""
        manifest = read_manifest(path, KIND)
        metadata, place = manifest["metadata"], path / MANIFEST
        checked(place, metadata, _Metadata)
        if unknown := metadata["settings"]["encoding"].keys() - Encoding.__dataclass_fields__:
            raise StorageError(
                f"{place} uses options this version does not know: {sorted(unknown)}; update "
                "gradsafe"
            )
        step = metadata["shard_samples"]
        if sum(-(-part["count"] // step) for part in metadata["parts"]) > SHARDS:
            raise StorageError(f"{place} is malformed: more than {SHARDS} shards")
        folder = cls(path, metadata, dict(manifest["files"]))
        if strangers := sorted(folder.files.keys() - {shard.name for shard in folder.plan}):
            raise StorageError(f"{place} is malformed: it lists {strangers[0]}, which is no shard")
        return folder

    def write_manifest(self) -> None:
        """Replace the manifest."""
        write_manifest(self.path, KIND, self.metadata, dict(sorted(self.files.items())))

    @property
    def plan(self) -> list[ShardPlan]:
        """All shards of the complete index."""
        step = self.metadata["shard_samples"]
        plan: list[ShardPlan] = []
        begin = 0
        for part in self.metadata["parts"]:
            end = begin + part["count"]
            for first in range(begin, end, step):
                name = f"shard-{len(plan):06d}.safetensors"
                plan.append(ShardPlan(name, first, min(step, end - first)))
            begin = end
        return plan

    @property
    def present(self) -> list[ShardPlan]:
        """The complete shards."""
        return [shard for shard in self.plan if shard.name in self.files]

    @property
    def missing(self) -> list[ShardPlan]:
        """The shards that are still to be computed."""
        return [shard for shard in self.plan if shard.name not in self.files]

    def write_shard(self, plan: ShardPlan, shard: Shard) -> dict[str, Any]:
        """Write a shard and return its record for `list_shards`."""
        flat = [token for item in shard.items for token in item.input_ids]
        ids = json.dumps(shard.ids).encode()
        tensors = {
            "signatures": shard.signatures.float(),
            "owners": shard.owners,
            "ids": torch.frombuffer(bytearray(ids), dtype=torch.uint8),
            "tokens": torch.tensor(flat, dtype=torch.int32),
            "lengths": torch.tensor([len(item) for item in shard.items]),
            "prompt_lengths": torch.tensor([item.prompt_length for item in shard.items]),
        }
        write_tensors(self.path / plan.name, tensors)
        return file_record(self.path / plan.name)

    def list_shards(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Add shards to the manifest, then remove their batches."""
        self.files.update(records)
        self.write_manifest()
        for name in records:
            shutil.rmtree(self._work(name), ignore_errors=True)

    def write_batch(self, plan: ShardPlan, number: int, key: str, values: Tensor) -> None:
        """Keep the signatures of one batch of an unfinished shard."""
        work = self._work(plan.name)
        work.mkdir(exist_ok=True)
        # Not flushed to disk: the checksum detects a torn file.
        note = {"key": key, "sha256": digest(values)}
        path = work / f"{number:06d}.safetensors"
        write_tensors(path, {"signatures": values}, note, durable=False)

    def read_batch(self, plan: ShardPlan, number: int, key: str) -> Tensor | None:
        """The signatures of a batch from an earlier run; None if there are none to use."""
        path = self._work(plan.name) / f"{number:06d}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                note, values = file.metadata() or {}, file.get_tensor("signatures")
        except SafetensorError:
            return None  # torn by a crash of the machine
        return values if note == {"key": key, "sha256": digest(values)} else None

    def sweep(self) -> None:
        """Remove the files of a killed run that no build needs."""
        kept = {self._work(shard.name) for shard in self.missing}
        for entry in self.path.iterdir():
            if entry.name.startswith(WORK) and entry not in kept:
                shutil.rmtree(entry)
            elif is_partial(entry.name):
                entry.unlink(missing_ok=True)  # a query may have finished it

    def copy_to(self, path: Path) -> None:
        """Copy the complete shards to another folder, atomically, see `TraceIndex.save`."""
        check_destination(path, KIND, _is_unlisted)
        target = path.resolve()
        alone = building_alone(target, Processes()) if target.exists() else nullcontext()
        with alone, replacing_folder(target) as scratch:
            self.verify()
            for name in [*(shard.name for shard in self.present), *self.faiss()]:
                shutil.copyfile(self.path / name, scratch / name)
                flush_to_disk(scratch / name)
            IndexFolder(scratch, self.metadata, self.files).write_manifest()

    def verify(self) -> None:
        """Raise StorageError for the first damaged shard."""
        for error in filter(None, map(self._damage, self.present)):
            raise error

    def repair(self) -> list[str]:
        """Remove what cannot be used, see `TraceIndex.repair`; returns the names of its shards."""
        before = self.plan
        parts = self.metadata["parts"]
        while len(parts) > 1 and not any(
            shard.first >= sum(part["count"] for part in parts[:-1]) for shard in self.present
        ):
            del parts[-1]
        unstarted = [shard.name for shard in before[len(self.plan) :]]
        damaged = [shard.name for shard in self.present if self._damage(shard)]
        for name in damaged:  # after the extensions: one with a damaged shard is kept
            del self.files[name]
        self.write_manifest()
        for name in [*damaged, *(self.faiss() if damaged else ())]:
            (self.path / name).unlink(missing_ok=True)
        self.sweep()
        return damaged + unstarted

    def faiss(self) -> list[str]:
        """Names of the files of `Candidates`."""
        return sorted(path.name for path in self.path.glob(f"{FAISS}*"))

    def ids(self, plan: ShardPlan) -> tuple[list[Id], Tensor]:
        """Ids of the samples of one shard, and the number of the sample of each row."""
        path = self.path / plan.name
        with _reading(path) as file:
            text, owners = file.get_tensor("ids"), file.get_tensor("owners")
        try:
            ids = msgspec.json.decode(bytes(text.numpy()), type=list[str | int])
        except (msgspec.DecodeError, ValueError) as error:
            raise StorageError(f"{path} is malformed: ids: {error}") from error
        steps = owners.diff(prepend=torch.tensor([plan.first]), append=owners[-1:])
        last = plan.first + plan.count - 1
        if len(ids) != plan.count or owners[-1:].tolist() != [last] or not steps.le(1).all():
            raise StorageError(f"{path} is malformed: its rows are not of {plan.count} samples")
        if (steps < 0).any():
            raise StorageError(f"{path} is malformed: its rows are out of order")
        return ids, owners

    def item(self, plan: ShardPlan, row: int) -> Encoded:
        """Token ids of one row of a shard."""
        with _reading(self.path / plan.name) as file:
            ends = file.get_tensor("lengths").cumsum(0).tolist()
            tokens = file.get_tensor("tokens")[ends[row - 1] if row else 0 : ends[row]]
            return Encoded(tokens.tolist(), int(file.get_tensor("prompt_lengths")[row]))

    def signatures(self, shards: Sequence[ShardPlan] | None = None) -> Iterator[Tensor]:
        """The signatures of some or all complete shards, one shard in memory at a time."""
        for shard in self.present if shards is None else shards:
            yield self.signature_rows(shard)

    def signature_rows(self, plan: ShardPlan, rows: Tensor | slice = slice(None)) -> Tensor:
        """Some rows of a shard's signatures; the file is mapped, and only these are read."""
        with _reading(self.path / plan.name) as file:
            signatures: Tensor = file.get_tensor("signatures")
            return signatures[rows]

    def _damage(self, plan: ShardPlan) -> StorageError | None:
        try:
            verify_file(self.path / plan.name, self.files[plan.name])
            self.ids(plan)
        except StorageError as error:
            return StorageError(
                f"{error} (samples {plan.first} to {plan.first + plan.count - 1}); "
                f"gradsafe trace repair {self.path} (gradsafe.TraceIndex.repair) removes damaged "
                "shards and keeps the rest, and the same build or extend computes them again"
            )
        return None

    def _work(self, name: str) -> Path:
        return self.path / (WORK + Path(name).stem)


def is_blank(path: Path) -> bool:
    """Whether a folder is empty, apart from locks and a manifest that was never finished."""
    return path.is_dir() and all(
        entry.name.startswith(LOCK) or is_partial(entry.name) for entry in path.iterdir()
    )


def digest(values: Tensor) -> str:
    """SHA-256 of the values of a tensor."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def _is_unlisted(name: str) -> bool:
    """Whether gradsafe writes a file of this name that the manifest does not list."""
    return name.startswith((LOCK, WORK, FAISS)) or is_partial(name)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error

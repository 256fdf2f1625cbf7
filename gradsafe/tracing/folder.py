"""The folder of an index: a manifest, shards, and the batches of shards that are being built."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from gradsafe._io.artifacts import (
    MANIFEST,
    PARTIAL,
    StorageError,
    check_destination,
    file_record,
    flush_to_disk,
    read_manifest,
    replacing_folder,
    verify_file,
    write_manifest,
    write_tensors,
)
from gradsafe._io.processes import Processes
from gradsafe.models import Encoded
from gradsafe.tracing.examples import Id
from gradsafe.tracing.lock import LOCK, building_alone

KIND = "trace-index"
WORK = ".work-"  # begins the name of a folder with the batches of an unfinished shard
FAISS = "faiss-"  # begins the names of the files of `approximate`
_METADATA: dict[str, Any] = {
    "settings": {"model": str, "tokenizer": str, "layer": (int, str), "encoding": dict},
    "layer": int,
    "layer_curve": (list, type(None)),
    "part_norm": str,
    "shard_samples": int,
    "parts": [{"examples": str, "count": int}],
}


@dataclass(frozen=True)
class ShardPlan:
    """The samples of a shard, `[first, first + count)`, and its file."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Shard:
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

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file."""
        flat = [token for item in self.items for token in item.input_ids]
        return {
            "signatures": self.signatures.float().contiguous(),
            "owners": self.owners,
            "ids": torch.frombuffer(bytearray(json.dumps(self.ids).encode()), dtype=torch.uint8),
            "tokens": torch.tensor(flat, dtype=torch.int32),
            "lengths": torch.tensor([len(item) for item in self.items]),
            "prompt_lengths": torch.tensor([item.prompt_length for item in self.items]),
        }


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
        """Write the manifest of a new index; the parent of its folder must exist."""
        path.mkdir(exist_ok=True)
        folder = cls(path, metadata, {})
        folder.write_manifest()
        return folder

    @classmethod
    def open(cls, path: Path) -> IndexFolder:
        """Read the manifest, and no shard.

        Raises:
            StorageError: No index, a malformed one, or one of a newer version.
        """
        manifest = read_manifest(path, KIND)
        metadata = manifest["metadata"]
        place = f"{path / MANIFEST} is malformed"
        _check(place, "metadata", metadata, _METADATA)
        if not metadata["parts"] or min(part["count"] for part in metadata["parts"]) < 1:
            raise StorageError(f"{place}: it has a part without samples")
        if metadata["shard_samples"] < 1:
            raise StorageError(f"{place}: 'shard_samples' must be at least 1")
        return cls(path, metadata, dict(manifest["files"]))

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

    def write_manifest(self) -> None:
        """Replace the manifest."""
        write_manifest(self.path, KIND, self.metadata, dict(sorted(self.files.items())))

    def write_shard(self, plan: ShardPlan, shard: Shard) -> dict[str, Any]:
        """Write a shard and return its record for `list_shards`."""
        write_tensors(self.path / plan.name, shard.tensors())
        return file_record(self.path / plan.name)

    def list_shards(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Add shards to the manifest, then remove their batches.

        Args:
            records: Name of the file to its record.
        """
        self.files.update(records)
        self.write_manifest()
        for name in records:
            shutil.rmtree(self._work(name), ignore_errors=True)

    def sweep(self) -> None:
        """Remove the files of a killed run that no build needs."""
        kept = {self._work(shard.name).name for shard in self.missing}
        for entry in self.path.iterdir():
            if entry.name.startswith(WORK) and entry.name not in kept:
                shutil.rmtree(entry)
            elif entry.name.endswith(PARTIAL):
                entry.unlink(missing_ok=True)  # a query may have finished it

    def copy_to(self, path: Path) -> None:
        """Copy the complete shards to another folder, atomically; an index there is replaced.

        Raises:
            FileNotFoundError: The parent folder does not exist.
            FileExistsError: `path` exists and is not an index.
            BusyFolderError: A build uses the index that is there.
            StorageError: A shard is damaged.
        """
        check_destination(path, KIND, _is_unlisted)
        target = path.resolve()
        alone = building_alone(target, Processes()) if target.exists() else nullcontext()
        with alone, replacing_folder(target) as scratch:
            self.verify()
            for name in [shard.name for shard in self.present] + [p.name for p in self.faiss()]:
                shutil.copyfile(self.path / name, scratch / name)
                flush_to_disk(scratch / name)
            IndexFolder(scratch, self.metadata, self.files).write_manifest()

    def write_batch(self, plan: ShardPlan, number: int, key: str, values: Tensor) -> None:
        """Keep the signatures of one batch of an unfinished shard."""
        work = self._work(plan.name)
        work.mkdir(exist_ok=True)
        # Not flushed to disk: the checksum detects a torn file.
        note = {"key": key, "sha256": digest(values)}
        write_tensors(
            work / f"{number:06d}.safetensors", {"signatures": values}, note, durable=False
        )

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
        usable = note.get("key") == key and note.get("sha256") == digest(values)
        return values if usable else None

    def verify(self) -> None:
        """Check every shard against the manifest.

        Raises:
            StorageError: Names the first damaged shard, its samples and the remedy.
        """
        for shard in self.present:
            self._verify(shard)

    def repair(self) -> list[str]:
        """Remove damaged shards, and the last extensions if none of their shards is complete.

        Returns:
            Names of the shards that are no longer there, or no longer planned.
        """
        before = self.plan
        parts = self.metadata["parts"]
        while len(parts) > 1 and not any(
            shard.first >= sum(part["count"] for part in parts[:-1]) for shard in self.present
        ):
            del parts[-1]
        damaged = [shard.name for shard in self.present if self._is_damaged(shard)]
        for name in damaged:  # after the extensions: one with a damaged shard stays
            del self.files[name]
        unstarted = [shard.name for shard in before[len(self.plan) :]]
        self.write_manifest()
        for path in [self.path / name for name in damaged] + (self.faiss() if damaged else []):
            path.unlink(missing_ok=True)
        self.sweep()
        return damaged + unstarted

    def faiss(self) -> list[Path]:
        """The files of `approximate`."""
        return [path for path in self.path.glob(f"{FAISS}*") if not path.name.endswith(PARTIAL)]

    def item(self, plan: ShardPlan, row: int) -> Encoded:
        """Token ids of one row of a shard."""
        with _reading(self.path / plan.name) as path:
            tensors = load_file(path)
        end = int(tensors["lengths"][: row + 1].sum())
        begin = end - int(tensors["lengths"][row])
        return Encoded(tensors["tokens"][begin:end].tolist(), int(tensors["prompt_lengths"][row]))

    def ids(self, plan: ShardPlan) -> tuple[list[Id], Tensor]:
        """Ids of the samples of one shard, and the number of the sample of each row."""
        with _reading(self.path / plan.name) as path, safe_open(path, "pt") as file:
            ids, owners = file.get_tensor("ids"), file.get_tensor("owners")
        return json.loads(bytes(ids.numpy()).decode()), owners

    def signatures(self, shards: Sequence[ShardPlan] | None = None) -> Iterator[Tensor]:
        """The signatures of some or all complete shards, one shard in memory at a time."""
        for shard in self.present if shards is None else shards:
            yield self.signature_rows(shard)

    def signature_rows(self, plan: ShardPlan, rows: Tensor | slice = slice(None)) -> Tensor:
        """Some rows of a shard's signatures; the file is mapped, and only these are read."""
        with _reading(self.path / plan.name) as path, safe_open(path, "pt") as file:
            signatures: Tensor = file.get_tensor("signatures")
            return signatures[rows]

    def _verify(self, plan: ShardPlan) -> None:
        try:
            verify_file(self.path / plan.name, self.files[plan.name])
        except StorageError as error:
            raise StorageError(
                f"{error} (samples {plan.first} to {plan.first + plan.count - 1}); "
                f"gradsafe trace repair {self.path} (gradsafe.TraceIndex.repair) removes damaged "
                "shards and keeps the rest, and the same build or extend computes them again"
            ) from error

    def _is_damaged(self, plan: ShardPlan) -> bool:
        try:
            self._verify(plan)
        except StorageError:
            return True
        return False

    def _work(self, name: str) -> Path:
        return self.path / (WORK + Path(name).stem)


def is_blank(path: Path) -> bool:
    """Whether a folder is empty, apart from locks and a manifest that was never finished."""
    return path.is_dir() and all(
        entry.name.startswith(LOCK) or entry.name.endswith(PARTIAL) for entry in path.iterdir()
    )


def batch_key(indices: Sequence[int], samples: str) -> str:
    """Identifies a batch file: which rows it holds, of which shard."""
    return hashlib.sha256(f"{samples} {list(indices)}".encode()).hexdigest()


def _is_unlisted(name: str) -> bool:
    """Whether gradsafe writes a file of this name that the manifest does not list."""
    return name.startswith((LOCK, WORK, FAISS)) or name.endswith(PARTIAL)


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (SafetensorError, FileNotFoundError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def _check(place: str, name: str, found: Any, expected: Any) -> None:
    """Raises StorageError where a JSON value lacks an entry or has one of another type."""
    if isinstance(expected, dict):
        for key, kind in expected.items():
            if not isinstance(found, dict) or key not in found:
                raise StorageError(f"{place}: {key!r} is missing in {name!r}")
            _check(place, key, found[key], kind)
    elif isinstance(expected, list):
        _check(place, name, found, list)
        for entry in found:
            _check(place, name, entry, expected[0])
    elif not isinstance(found, expected):
        raise StorageError(f"{place}: {name!r} is of the wrong type, {type(found).__name__}")


def digest(values: Tensor) -> str:
    """SHA-256 of the values of a tensor."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()

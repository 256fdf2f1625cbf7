"""The folder of an index: a manifest, shards, and the batches of the shard being built."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from gradsafe._io.artifacts import (
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
from gradsafe.tracing.examples import Id
from gradsafe.tracing.lock import LOCK, building_alone
from gradsafe.tracing.manifest import check_metadata
from gradsafe.tracing.shard import Shard, ShardPlan, parse_ids

KIND = "trace-index"
WORK = ".work-"  # begins the name of a folder with the batches of an unfinished shard


class IndexFolder:
    """Reads and writes the folder; every file appears whole or not at all.

    Attributes:
        path: The folder.
        metadata: JSON values of the manifest; `write_manifest` saves changes.
        files: Shards that are complete, each with its checksum.
    """

    def __init__(
        self, path: Path, metadata: dict[str, Any], files: dict[str, dict[str, Any]]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.files = files

    @classmethod
    def create(cls, path: Path, metadata: dict[str, Any]) -> IndexFolder:
        """Start a folder.

        Raises:
            FileNotFoundError: The parent folder does not exist.
            FileExistsError: `path` exists and is not empty.
        """
        if not path.resolve().parent.is_dir():
            raise FileNotFoundError(f"cannot build {path}: no such folder {path.parent}")
        if path.exists() and not is_blank(path):
            raise FileExistsError(f"cannot build {path}: it exists and is no index; choose another")
        path.mkdir(exist_ok=True)
        folder = cls(path, metadata, {})
        folder.write_manifest()
        return folder

    @classmethod
    def open(cls, path: Path) -> IndexFolder:
        """Read the manifest; the shards stay untouched.

        Raises:
            StorageError: No index, a malformed one, or one of a newer version.
        """
        manifest = read_manifest(path, KIND)
        check_metadata(path, manifest["metadata"])
        return cls(path, manifest["metadata"], dict(manifest["files"]))

    @property
    def plan(self) -> list[ShardPlan]:
        """All shards of the finished index."""
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
        """The shards that are complete."""
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
        """Enter shards into the manifest; only then drop the batches that could restore them.

        Args:
            records: Name of the file to its record.
        """
        self.files.update(records)
        self.write_manifest()
        for name in records:
            shutil.rmtree(self._work(name), ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a killed run left and nothing needs."""
        kept = {self._work(shard.name).name for shard in self.missing}
        for entry in self.path.iterdir():
            if entry.name.startswith(WORK) and entry.name not in kept:
                shutil.rmtree(entry)
            elif entry.name.endswith(PARTIAL):
                entry.unlink()

    def copy_to(self, path: Path) -> None:
        """Copy what is complete to another folder, atomically; an index there is replaced.

        Raises:
            FileNotFoundError: The parent folder does not exist.
            FileExistsError: `path` exists and is not an index.
            BusyFolderError: A build works in the index that is there.
            StorageError: A shard is damaged.
        """
        check_destination(path, KIND, _is_left_by_a_build)
        target = path.resolve()
        alone = building_alone(target, Processes()) if target.exists() else nullcontext()
        with alone, replacing_folder(target) as scratch:
            copy = IndexFolder(scratch, self.metadata, self.files)
            for shard in self.present:
                self._verify(shard)
                shutil.copyfile(self.path / shard.name, copy.path / shard.name)
                flush_to_disk(copy.path / shard.name)
            copy.write_manifest()

    def write_batch(self, plan: ShardPlan, number: int, key: str, values: Tensor) -> None:
        """Keep the signatures of one batch of an unfinished shard."""
        work = self._work(plan.name)
        work.mkdir(exist_ok=True)
        # The checksum, not a forced write to disk, guards against a torn file.
        note = {"key": key, "sha256": _digest(values)}
        write_tensors(
            work / f"{number:06d}.safetensors", {"signatures": values}, note, durable=False
        )

    def read_batch(self, plan: ShardPlan, number: int, key: str) -> Tensor | None:
        """The signatures of a batch that an earlier run left, None if there are none to use."""
        path = self._work(plan.name) / f"{number:06d}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                note, values = file.metadata(), file.get_tensor("signatures")
        except SafetensorError:
            return None  # torn by a crash of the machine: it is computed again
        if note is None or note.get("key") != key or note.get("sha256") != _digest(values):
            return None
        return values

    def verify(self) -> None:
        """Check every shard against the manifest.

        Raises:
            StorageError: Names the first damaged shard, its samples and the way out.
        """
        for shard in self.present:
            self._verify(shard)

    def drop_damaged(self) -> list[ShardPlan]:
        """Strike damaged shards from the manifest and remove them; returns them."""
        damaged = [shard for shard in self.present if self._is_damaged(shard)]
        for shard in damaged:
            del self.files[shard.name]
        self.write_manifest()
        for shard in damaged:
            (self.path / shard.name).unlink(missing_ok=True)
        return damaged

    def drop_unstarted(self) -> list[ShardPlan]:
        """Strike the last extensions from the manifest as long as none of their shards is complete.

        Returns:
            The shards that they lacked; `extend` with the same samples promises them again.
        """
        before = self.plan
        parts = self.metadata["parts"]
        while len(parts) > 1 and not any(
            shard.first >= sum(part["count"] for part in parts[:-1]) for shard in self.present
        ):
            del parts[-1]
        self.write_manifest()
        self.sweep()
        return before[len(self.plan) :]

    def read(self, plan: ShardPlan) -> Shard:
        """Read one shard."""
        with _reading(self.path / plan.name) as path:
            return Shard.from_tensors(load_file(path))

    def read_ids(self, plan: ShardPlan) -> tuple[list[Id], Tensor]:
        """Ids and owners of one shard."""
        with _reading(self.path / plan.name) as path, safe_open(path, "pt") as file:
            ids, owners = file.get_tensor("ids"), file.get_tensor("owners")
        return parse_ids(ids), owners

    def signatures(self) -> Iterator[Tensor]:
        """The signatures of the complete shards, one shard in memory at a time."""
        for shard in self.present:
            with _reading(self.path / shard.name) as path, safe_open(path, "pt") as file:
                values = file.get_tensor("signatures")
            yield values

    def signature_rows(self, plan: ShardPlan, rows: Tensor) -> Tensor:
        """Some rows of a shard's signatures; the file is mapped, and the others are not read."""
        with _reading(self.path / plan.name) as path, safe_open(path, "pt") as file:
            signatures: Tensor = file.get_tensor("signatures")
            return signatures[rows]

    def _verify(self, plan: ShardPlan) -> None:
        try:
            verify_file(self.path / plan.name, self.files[plan.name])
        except StorageError as error:
            raise StorageError(
                f"{error} (samples {plan.first} to {plan.first + plan.count - 1}); "
                f"gradsafe trace repair {self.path} (gradsafe.TraceIndex.repair) drops damaged "
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
    """Whether a folder is empty but for a lock and a manifest that was never finished."""
    return path.is_dir() and all(
        entry.name == LOCK or entry.name.endswith(PARTIAL) for entry in path.iterdir()
    )


def _is_left_by_a_build(name: str) -> bool:
    return name == LOCK or name.startswith(WORK) or name.endswith(PARTIAL)


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (SafetensorError, FileNotFoundError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def batch_key(indices: Sequence[int], samples: str) -> str:
    """What a batch file must say to be used: which rows it holds, of which shard."""
    return hashlib.sha256(f"{samples} {list(indices)}".encode()).hexdigest()


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()

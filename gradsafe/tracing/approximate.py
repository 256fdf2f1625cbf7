"""Approximate search: FAISS proposes rows, and their exact cosines decide."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from gradsafe._io.artifacts import (
    StorageError,
    atomic_path,
    file_record,
    verify_file,
    write_tensors,
)
from gradsafe.tracing.folder import FAISS, IndexFolder, digest
from gradsafe.tracing.lock import LOCK
from gradsafe.tracing.matching import FeatureMoments, Metric, feature_moments

UNREADABLE = (ValueError, SafetensorError, OSError, RuntimeError, KeyError, TypeError)
PER_ROW = 10  # candidates for each row that is asked for
LEAST = 100  # candidates
TRAINING = 64  # rows per list that the lists are learned from
PROBED = 8  # one list of so many is searched
GROWTH = 2  # the lists are learned anew when there are so many times the rows


def load_faiss() -> Any:
    """The module; without it, an ImportError names the extra."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "gradsafe.TraceIndex.query: approximate=True needs FAISS: pip install "
            "'gradsafe[faiss]', or leave it out for the exact search"
        ) from error


class Candidates:
    """Rows that may be the most similar ones, from an inverted file of FAISS.

    It has sqrt(N) lists of rows, of which an eighth is searched per query, and takes one byte per
    value. It is saved beside the shards, in `faiss-METRIC.index`, and memory-mapped from there;
    `faiss-METRIC.safetensors` says which shards it covers. Only rows of later shards are added.
    A file that is missing, damaged or of other shards is built again.

    Attributes:
        moments: Of all rows, if the metric needs them and they are known.
    """

    moments: FeatureMoments | None = None
    _trained_moments: FeatureMoments | None = None

    def __init__(self, folder: IndexFolder, metric: Metric, rows: int, progress: bool) -> None:
        self._faiss = load_faiss()
        self._folder = folder
        self._metric = metric
        self._rows = rows
        self._path = folder.path / f"{FAISS}{_name(metric)}.index"
        self._shards = [[plan.name, folder.files[plan.name]["sha256"]] for plan in folder.present]
        with ExitStack() as stack:
            with suppress(OSError, NotImplementedError):  # a folder that cannot be written
                # One process builds, and the others wait for its files.
                stack.enter_context(FileLock(folder.path / f"{LOCK}{FAISS}{_name(metric)}"))
            try:
                covered = self._load()
            except UNREADABLE as error:
                warnings.warn(
                    f"gradsafe.TraceIndex: cannot use {self._path} ({error}); it is built again",
                    stacklevel=2,
                )
                covered = 0
            if covered < len(self._shards):
                self._add(covered, progress)
                self._save()

    def __call__(self, queries: Tensor, needed: int) -> list[Tensor]:
        """Row numbers for each of `[Q, 2d]` raw signatures, ascending, at least `needed`."""
        count = min(max(PER_ROW * needed, LEAST), self._rows)
        ready = self._coded(queries.float())
        lists = self._index.nlist
        probed = min(lists, max(8, lists // PROBED))
        options: dict[str, Any] = {}
        if self._index.ntotal > self._rows:  # another process has added rows
            options["sel"] = self._faiss.IDSelectorRange(0, self._rows)
        while True:
            params = self._faiss.SearchParametersIVF(nprobe=probed, **options)
            numbers = self._index.search(ready, count, params=params)[1]
            found = [torch.from_numpy(row[row >= 0]) for row in numbers]
            if probed == lists or min(map(len, found)) >= needed:
                return [rows.sort().values for rows in found]
            probed = min(lists, 2 * probed)

    def _load(self) -> int:
        """Reads the saved index; returns how many shards it has, 0 if it has to be built."""
        if not self._record.is_file():
            return 0
        with safe_open(self._record, "pt") as file:
            note, moments = json.loads(file.metadata()["index"]), file.get_tensor("moments")
        covered = min(len(note["shards"]), len(self._shards))
        if note["shards"][:covered] != self._shards[:covered]:
            raise StorageError("it is an index of other shards")
        if note["moments"] != digest(moments):
            raise StorageError(f"{self._record} is damaged")
        verify_file(self._path, note["file"])
        if self._rows > GROWTH * note["trained"]:
            return 0
        self._index = self._read(self._path, mapped=covered == len(self._shards))
        if self._index.ntotal != note["rows"]:
            raise StorageError("another process replaced it")
        self._trained = note["trained"]
        if len(moments):
            self._trained_moments = FeatureMoments(*moments[:2])
            if note["shards"] == self._shards:
                self.moments = FeatureMoments(*moments[2:])
        return covered

    def _add(self, covered: int, progress: bool) -> None:
        """Adds the rows of the shards that are not covered."""
        if self._metric.part_norm == "zscore":
            self.moments = feature_moments(self._folder.signatures)
        if not covered:
            self._trained, self._trained_moments = self._rows, self.moments
            self._index = self._train()
        known = self._index.ntotal
        with tqdm(
            total=self._rows, initial=known, desc="FAISS index", unit="row", disable=not progress
        ) as bar:
            for part in self._folder.signatures(self._folder.present[covered:]):
                self._index.add(self._coded(part))
                bar.update(len(part))

    def _train(self) -> Any:
        lists = max(1, math.isqrt(self._rows))
        every = max(1, self._rows // (TRAINING * lists))
        sample = torch.cat(list(_every(self._folder.signatures(), every)))
        width = sample.shape[1]
        index = self._faiss.IndexIVFScalarQuantizer(
            self._faiss.IndexFlatIP(width),
            width,
            lists,
            self._faiss.ScalarQuantizer.QT_8bit,
            self._faiss.METRIC_INNER_PRODUCT,
        )
        index.cp.min_points_per_centroid = 1
        index.train(self._coded(sample))
        return index

    def _save(self) -> None:
        """Saves the index and maps the file; where that is impossible, it stays in memory."""
        moments = [*(self._trained_moments or ()), *(self.moments or ())]
        stacked = torch.stack(moments) if moments else torch.empty(0, dtype=torch.float32)
        try:
            with atomic_path(self._path) as partial:
                self._faiss.write_index(self._index, str(partial))
                note = {
                    "file": file_record(partial),
                    "rows": self._rows,
                    "trained": self._trained,
                    "shards": self._shards,
                    "moments": digest(stacked),
                }
                mapped = self._read(partial, mapped=True)
            write_tensors(self._record, {"moments": stacked}, {"index": json.dumps(note)})
            self._index = mapped
        except (OSError, RuntimeError) as error:  # RuntimeError: of FAISS
            warnings.warn(
                f"gradsafe.TraceIndex: cannot save {self._path} ({error}); this process keeps the "
                "FAISS index in memory, and the next one builds it again",
                stacklevel=3,
            )

    @property
    def _record(self) -> Path:
        return self._path.with_suffix(".safetensors")

    def _coded(self, rows: Tensor) -> Any:
        """Rows as FAISS compares them, with the moments of the rows it was trained on."""
        prepared = self._metric.prepare(rows, self._trained_moments)
        return normalize(prepared).contiguous().numpy()

    def _read(self, path: Path, *, mapped: bool) -> Any:
        flags = self._faiss.IO_FLAG_MMAP | self._faiss.IO_FLAG_READ_ONLY
        return self._faiss.read_index(str(path), flags if mapped else 0)


def saved_metrics(folder: IndexFolder) -> list[Metric]:
    """The metrics whose index of FAISS is saved in a folder."""
    names = [Path(name) for name in folder.faiss()]
    parts = [n.stem.removeprefix(FAISS).partition("-") for n in names if n.suffix == ".index"]
    return [Metric(norm, float(weight) if weight else None) for norm, _, weight in parts]  # type: ignore[arg-type]


def _name(metric: Metric) -> str:
    weight = metric.gradient_weight
    return metric.part_norm if weight is None else f"{metric.part_norm}-{float(weight)!r}"


def _every(shards: Iterable[Tensor], step: int) -> Iterator[Tensor]:
    """Every step-th row, counted over all shards."""
    first = 0
    for rows in shards:
        yield rows[-first % step :: step].clone()
        first += len(rows)

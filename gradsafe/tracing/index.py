"""The index of a training set: build, resume, extend, save, load, query."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gradsafe._checks import check_value
from gradsafe._io.fingerprints import model_fingerprint
from gradsafe._io.processes import Processes
from gradsafe.models import Encoding, pad_token_id
from gradsafe.tracing import build as building
from gradsafe.tracing.approximate import load_faiss, saved_metrics
from gradsafe.tracing.config import RULES, PartNorm, QueryConfig, TraceConfig
from gradsafe.tracing.examples import ExampleEncoder, Id, Samples, read_examples
from gradsafe.tracing.fill import Job
from gradsafe.tracing.folder import IndexFolder
from gradsafe.tracing.hits import Hits
from gradsafe.tracing.lock import building_alone
from gradsafe.tracing.matching import Metric, best_samples, largest_k, rows_needed
from gradsafe.tracing.search import Search
from gradsafe.tracing.signature import signatures


class IncompleteIndexWarning(UserWarning):
    """An index has only some of its samples: its build was stopped, or it was repaired."""


class TraceIndex:
    """Finds the training samples that caused a behavior of the model (RepT).

    Create one with `TraceIndex.build` or `TraceIndex.load`. Any number of threads may use one
    index, or several on one model, while others run the model's forward pass: batches take turns,
    and so do calls of `extend`.

    Attributes:
        path: Its folder.
        layer: Index into `hidden_states`, see `resolve_layer`.
        layer_rule: The rule that chose the layer; None if it was given.
        layer_curve: Similarities of consecutive layers, see `LayerChoice`; None if the layer was
            given.
        part_norm: How queries compare signatures by default, see `Metric`.
        ids: Ids of its samples, in order.
    """

    def __init__(self, folder: IndexFolder, model: nn.Module, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._extending = threading.Lock()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._open(folder)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        tokenizer: Any,
        examples: Samples,
        path: str | os.PathLike[str] | None = None,
        *,
        resume: bool = True,
        batch_tokens: int = 4096,
        progress: bool = True,
        processes: Processes | None = None,
        **options: Any,
    ) -> TraceIndex:
        """Compute the signatures of all samples.

        A build that was killed resumes at the batch where it stopped and ends with the same bytes.

        Args:
            model: A causal language model of `transformers`, fine-tuned on the samples.
            tokenizer: Its tokenizer.
            examples: A JSON Lines file, or rows (a list of dicts, a `datasets.Dataset`), with
                prompt (text or messages) and response, or in another of TRL's formats (prompt and
                completion, messages); optionally with an id (text or integer; the default is the
                sample's number).
            path: The folder to write; None for a temporary one, see `save`.
            resume: Continue an existing index.
            batch_tokens: Padded tokens per batch; lower it if memory runs out.
            progress: Show a progress bar.
            processes: The processes that share the work, a shard at a time; all of them make this
                call, and the index is the same as that of one process. None for torch's default
                process group if it is initialised, else for this process alone.
            **options: Fields of `TraceConfig`.

        Returns:
            The complete index.

        Raises:
            TypeError: An option or a sample of the wrong type.
            ValueError: Samples without prompt or response, ids that occur twice, a sample beyond
                the context (as ContextOverflowError), options that do not fit, NaN (as
                NonFiniteSignatureError), or a folder started with another model, layer, options or
                samples; fingerprints are printed.
            FileExistsError: `path` holds something else, or an index and `resume` is False.
            FileNotFoundError: Its parent folder, or the file of examples, does not exist.
            OSError: The disk is full (complete shards stay usable), or (as BusyFolderError) another
                build uses the folder.
            Stopped: Another process failed; the message gives the reason.
        """
        config = TraceConfig(**options)
        temporary = None
        job = Job(model, tokenizer, batch_tokens, progress, processes or Processes.of_group())
        with job.processes.ending_together():
            if path is None:
                if job.processes.count > 1:
                    raise ValueError("gradsafe.TraceIndex.build: several processes need a path")
                temporary = tempfile.TemporaryDirectory(prefix="gradsafe-")
                path = temporary.name
            folder = building.build_folder(job, examples, Path(path), config, resume)
        index = cls(folder, model, tokenizer)
        index._temporary = temporary
        index._warn_if_incomplete()
        return index

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, tokenizer: Any) -> TraceIndex:
        """Open an index of the same model and tokenizer, after checking every shard.

        Raises:
            StorageError: The folder is missing, foreign or damaged (a ValueError); a damaged shard
                is named.
            ValueError: It was built with another model or tokenizer.

        Warns:
            IncompleteIndexWarning: Some samples are missing; the others can be queried.
        """
        folder = IndexFolder.open(Path(path))
        building.check_settings(folder, building.model_settings(model, tokenizer), "load")
        folder.verify()
        index = cls(folder, model, tokenizer)
        index._warn_if_incomplete()
        return index

    @staticmethod
    def repair(path: str | os.PathLike[str]) -> list[str]:
        """Remove the damaged shards of an index; the rest can be loaded again.

        `build` or `extend` with the same samples computes them again. An extension that stopped
        before any of its shards was complete (because of NaN, for example) is removed as well, so
        that other samples can be added. Damaged files of FAISS need no repair: a query builds them
        again.

        Returns:
            Names of the shards that were removed.

        Raises:
            StorageError: The manifest itself cannot be used.
            BusyFolderError: A build uses the folder.
        """
        IndexFolder.open(Path(path))
        with building_alone(Path(path), Processes()):
            return IndexFolder.open(Path(path)).repair()

    def extend(
        self,
        examples: Samples,
        *,
        batch_tokens: int = 4096,
        progress: bool = True,
        processes: Processes | None = None,
    ) -> None:
        """Add samples, also to saved indexes of FAISS; the same call resumes one that was killed.

        Args:
            examples: As in `build`.
            batch_tokens: Padded tokens per batch.
            progress: Show a progress bar.
            processes: As in `build`.

        Raises:
            ValueError: As in `build`; an id that is in use; earlier samples are incomplete; or the
                model has changed since the index was built.
            OSError: As in `build`.
            Stopped: As in `build`.
        """
        job = Job(
            self.model, self.tokenizer, batch_tokens, progress, processes or Processes.of_group()
        )
        with self._extending, job.processes.ending_together():
            self._open(building.extend_folder(job, self._folder, examples))
            if job.processes.first and importlib.util.find_spec("faiss"):
                for metric in saved_metrics(self._folder):
                    self._search.candidates(metric, progress)
        self._warn_if_incomplete()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the index to another folder, atomically; an index there is replaced.

        Raises:
            FileNotFoundError: The parent folder does not exist.
            FileExistsError: `path` exists and is not an index.
            ValueError: `path` is the folder of this index, or (as StorageError) a shard is damaged.
            BusyFolderError: A build uses the index that is there.
        """
        if Path(path).resolve() == self.path.resolve():
            raise ValueError(f"gradsafe.TraceIndex.save: {path} is the folder of this index")
        self._folder.copy_to(Path(path))

    def query(
        self,
        queries: Samples | Mapping[str, Any],
        k: int = 10,
        *,
        part_norm: PartNorm | None = None,
        gradient_weight: float | None = None,
        approximate: bool = False,
        batch_tokens: int = 4096,
        progress: bool = False,
    ) -> Hits:
        """Find the samples most similar to an observed behavior.

        Args:
            queries: Rows as in `build`, with the observed response; one such dict; or a JSON Lines
                file.
            k: Samples per query, at most 1024.
            part_norm: None for the default of the index, see `Metric`.
            gradient_weight: Weight of the gradient part, see `Metric`.
            approximate: Compare with candidates of FAISS only (extra `faiss`): a similar sample may
                be missed, scores are exact. The first such query reads all samples and saves an
                index of FAISS beside them, one byte per value; later ones, in other processes too,
                map that file and read their candidates. `extend` adds to it.
            batch_tokens: Padded tokens per batch.
            progress: Show a progress bar over the queries' signatures, and one over the samples
                where an index of FAISS is built.

        Returns:
            The hits, best first.

        Raises:
            ValueError: No query, k above the number of samples, no complete sample, options that
                do not fit, or the model has changed since the index was built.
            ImportError: FAISS is asked for and not installed.

        Warns:
            UserWarning: The saved index of FAISS cannot be used, or cannot be saved; or all samples
                of the index are equal, so that "zscore" gives 0 for each.
        """
        config = QueryConfig(k, part_norm, gradient_weight, approximate)
        metric = Metric(part_norm or self.part_norm, config.gradient_weight)
        check_value("TraceIndex.query", "batch_tokens", batch_tokens, int)
        if approximate:
            load_faiss()  # before the signatures are computed
        search = self._search  # another thread may extend the index
        count = len(search.ids)
        if not count:
            raise ValueError(
                f"gradsafe.TraceIndex.query: {self.path} has no complete sample yet: finish its "
                "build"
            )
        if k > count:
            raise ValueError(
                f"gradsafe.TraceIndex.query: expected k at most {count}, the number of samples "
                f"in the index, got {k}; pass min(k, len(index))"
            )
        given = {"model": model_fingerprint(self.model)}  # it may have been trained since
        building.check_settings(self._folder, given, "query")
        needed = rows_needed(k, search.owners)
        source = [queries] if isinstance(queries, Mapping) else queries
        samples = read_examples(source, "queries")
        encoding = Encoding(**self._folder.metadata["settings"]["encoding"])
        items, owners = ExampleEncoder(self.model, self.tokenizer, encoding).all(samples)
        found = signatures(
            self.model,
            items,
            [self.layer],
            pad_token_id(self.tokenizer, self.model),
            batch_tokens,
            "queries" if progress else None,
            names=[samples[owner].where for owner in owners],
        )[self.layer]
        best = search.best_rows(found, needed, metric, approximate, progress)
        if search.is_blank(metric):
            warnings.warn(
                f"gradsafe.TraceIndex.query: all scores are 0: {self.path} has one sample, or "
                'equal ones only, and part_norm "zscore" compares differences between samples; '
                'pass part_norm="unit"',
                stacklevel=2,
            )
        scores, rows = best_samples(best, search.owners, owners, len(samples), k)
        positions = search.owners[rows]
        ids = [[search.ids[position] for position in row] for row in positions.tolist()]
        last_windows = list(dict(zip(owners, items, strict=True)).values())
        return Hits(ids, scores, positions, rows, self, last_windows)

    def __len__(self) -> int:
        """Number of its samples."""
        return len(self.ids)

    @property
    def largest_k(self) -> int:
        """The largest k of a query: all samples, or as many as one search surely finds."""
        return largest_k(self._search.owners)

    def _open(self, folder: IndexFolder) -> None:
        folder.path = folder.path.absolute()  # the working directory may change
        self._folder = folder
        self._search = Search(folder)
        self.path: Path = folder.path
        metadata, asked = folder.metadata, folder.metadata["settings"]["layer"]
        self.layer: int = metadata["layer"]
        self.layer_rule: str | None = asked if asked in RULES else None
        self.layer_curve: list[float] | None = metadata["layer_curve"]
        self.part_norm: PartNorm = metadata["part_norm"]
        self.ids: list[Id] = list(self._search.ids.values())

    def _warn_if_incomplete(self) -> None:
        missing = sum(shard.count for shard in self._folder.missing)
        if missing:
            warnings.warn(
                f"gradsafe.TraceIndex: {self.path} has {len(self)} of {len(self) + missing} "
                "samples; build or extend with the samples it was started with computes the rest",
                IncompleteIndexWarning,
                stacklevel=3,
            )

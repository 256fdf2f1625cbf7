"""The index of a training set: build, resume, extend, save, load, query."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gradsafe._io.processes import Processes
from gradsafe.models import Encoded, pad_token_id, token_texts
from gradsafe.tracing import build as building
from gradsafe.tracing.approximate import load_faiss
from gradsafe.tracing.examples import Encoding, ExampleEncoder, Id, Samples, read_examples
from gradsafe.tracing.folder import IndexFolder
from gradsafe.tracing.hits import Hits
from gradsafe.tracing.layer_choice import similarity_curve
from gradsafe.tracing.lock import building_alone
from gradsafe.tracing.matching import Metric, PartNorm, best_samples, rows_needed
from gradsafe.tracing.search import Search
from gradsafe.tracing.signature import LAST, signatures
from gradsafe.tracing.tokens import unit_gradients


class IncompleteIndexWarning(UserWarning):
    """An index holds only some of its samples: its build was stopped, or it was repaired."""


class TraceIndex:
    """Finds the training samples that a behavior of the model comes from (RepT).

    Make one with `TraceIndex.build` or `TraceIndex.load`.

    Attributes:
        path: The folder it lives in.
        layer: Index into `hidden_states`, see `resolve_layer`.
        layer_curve: Similarities of consecutive layers, see `LayerChoice`; None unless the layer
            was chosen by a rule.
        part_norm: How queries compare signatures unless they say otherwise, see `Metric`.
    """

    def __init__(self, folder: IndexFolder, model: nn.Module, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        folder.path = folder.path.absolute()  # the working directory may change
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._refresh()

    @classmethod
    def build(
        cls,
        model: nn.Module,
        tokenizer: Any,
        examples: Samples,
        path: str | os.PathLike[str] | None = None,
        *,
        layer: int | Literal["last", "auto", "auto-lower", "auto-single"] = "last",
        part_norm: PartNorm | None = None,
        resume: bool = True,
        batch_tokens: int = 4096,
        progress: bool = True,
        shard_samples: int | None = None,
        processes: Processes | None = None,
        **encoding: Any,
    ) -> TraceIndex:
        """Compute the signatures of all samples.

        A build that was killed goes on at the batch where it stopped and ends with the same bytes.

        Args:
            model: A causal language model of `transformers`, fine-tuned on the samples.
            tokenizer: Its tokenizer.
            examples: A JSON Lines file, or dicts (a list, a `datasets.Dataset`) with prompt,
                response and optionally id (text or integer; else the sample's number).
            path: The folder to write; None for a temporary one, see `save`.
            layer: "last", an index into `hidden_states` (see `resolve_layer`), or a rule of
                `choose_layer`: "auto" is the phase transition.
            part_norm: The default of `query`; None for that of the index that is there, "zscore"
                for a new one.
            resume: Go on with an index that is there already.
            batch_tokens: Padded tokens per batch; lower it if memory runs out.
            progress: Show a progress bar.
            shard_samples: Samples per file; None for those of the index that is there, 1024 for a
                new one.
            processes: Who shares the work, a shard at a time, into one folder; all of them call
                this, and the index is that of one process. None for torch's default process group
                where one is initialised, else this process alone, as is `Processes()`.
            **encoding: Fields of `Encoding`: template, system, append_eos, overflow, max_length.

        Returns:
            The complete index.

        Raises:
            ValueError: Samples without prompt or response, ids that occur twice, a sample beyond
                the context (as ContextOverflowError), options that do not fit, NaN (as
                NonFiniteSignatureError), or a folder started with another model, layer, options or
                examples; fingerprints are printed.
            FileExistsError: `path` holds something else, or an index and `resume` is False.
            FileNotFoundError: Its parent folder, or the file of examples, does not exist.
            OSError: The disk is full, and what is complete stays usable; or (as BusyFolderError)
                another build works in the folder.
            Stopped: Another process failed; the message says why.
        """
        if part_norm is not None:
            Metric(part_norm)
        _check_counts(batch_tokens=batch_tokens)
        if shard_samples is not None:
            _check_counts(shard_samples=shard_samples)
        processes = Processes.of_group() if processes is None else processes
        processes.next_job()
        temporary = None
        if path is None:
            if processes.count > 1:
                raise ValueError("gradsafe.TraceIndex.build: several processes need a path")
            temporary = tempfile.TemporaryDirectory(prefix="gradsafe-")
            path = temporary.name
        with processes.ending_together():
            folder = building.build_folder(
                model,
                tokenizer,
                examples,
                Path(path),
                processes,
                layer=layer,
                part_norm=part_norm,
                resume=resume,
                batch_tokens=batch_tokens,
                progress=progress,
                shard_samples=shard_samples,
                encoding=Encoding(**encoding),
            )
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
        given = building.settings_of(model, tokenizer, LAST, Encoding())
        own = {name: given[name] for name in ("model", "tokenizer")}
        building.check_settings(folder, own, "load")
        folder.verify()
        index = cls(folder, model, tokenizer)
        index._warn_if_incomplete()
        return index

    @staticmethod
    def repair(path: str | os.PathLike[str]) -> list[str]:
        """Drop the damaged shards of an index; the rest can be loaded again.

        `build` or `extend` with the same samples computes them anew. An extension that stopped, by
        NaN for example, before any of its shards was complete is dropped as well, so that other
        samples can take its place.

        Returns:
            Names of the shards that were dropped.

        Raises:
            StorageError: The manifest itself cannot be used.
            BusyFolderError: A build works in the folder.
        """
        IndexFolder.open(Path(path))
        with building_alone(Path(path), Processes()):
            folder = IndexFolder.open(Path(path))
            unstarted = folder.drop_unstarted()  # first: a damaged shard keeps its part
            return [shard.name for shard in [*folder.drop_damaged(), *unstarted]]

    def extend(
        self,
        examples: Samples,
        *,
        batch_tokens: int = 4096,
        progress: bool = True,
        processes: Processes | None = None,
    ) -> None:
        """Add samples; a call that was killed is taken up by the same call.

        Args:
            examples: As in `build`.
            batch_tokens: Padded tokens per batch.
            progress: Show a progress bar.
            processes: As in `build`.

        Raises:
            ValueError: As in `build`; an id that is taken; or the samples before are incomplete.
            OSError: As in `build`.
            Stopped: As in `build`.
        """
        _check_counts(batch_tokens=batch_tokens)
        processes = Processes.of_group() if processes is None else processes
        processes.next_job()
        with processes.ending_together():
            self._folder = building.extend_folder(
                self._folder,
                self.model,
                self.tokenizer,
                examples,
                processes,
                batch_tokens,
                progress,
            )
        self._refresh()
        self._warn_if_incomplete()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the index to another folder, atomically; an index there is replaced.

        Raises:
            FileNotFoundError: The parent folder does not exist.
            FileExistsError: `path` exists and is not an index.
            ValueError: `path` is the folder of this index, or (as StorageError) a shard is damaged.
            BusyFolderError: A build works in the index that is there.
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
        """Find the samples most similar to observed behavior.

        Args:
            queries: Dicts with prompt and the observed response, one such dict, or a JSON Lines
                file.
            k: Samples per query, at most 1024.
            part_norm: None for the index's own, see `Metric`.
            gradient_weight: Share of the gradient part, see `Metric`; None for equal parts.
            approximate: Compare with candidates of FAISS only (extra `faiss`): a good hit may be
                missed, scores are exact. The first such query reads all samples and keeps them in
                memory at one byte per value; later ones read their candidates.
            batch_tokens: Padded tokens per batch.
            progress: Show a progress bar over the queries' signatures.

        Returns:
            The hits, best first.

        Raises:
            ValueError: No query, k above the number of samples, no complete sample, or options that
                do not fit.
            ImportError: FAISS is asked for and not installed.
        """
        if approximate:
            load_faiss()  # missed now, not behind the signatures
        metric = Metric(self.part_norm if part_norm is None else part_norm, gradient_weight)
        self._refuse_empty()
        _check_counts(k=k, batch_tokens=batch_tokens)
        if k > len(self):
            raise ValueError(
                f"gradsafe.TraceIndex.query: expected k at most {len(self)}, the number of samples "
                f"in the index, got {k}; pass min(k, len(index))"
            )
        needed = rows_needed(k, self._owners)
        single = isinstance(queries, Mapping)
        samples = read_examples([queries] if single else queries, "queries")  # type: ignore[list-item, arg-type]
        encode = ExampleEncoder(self.model, self.tokenizer, self._encoding)
        items, owners = encode.all(samples)
        label = "queries" if progress else None
        pad_id = pad_token_id(self.tokenizer)
        names = [samples[owner].where for owner in owners]
        found = signatures(
            self.model, items, [self.layer], pad_id, batch_tokens, label, names=names
        )[self.layer]
        best = self._search.best_rows(found, needed, metric, approximate)
        scores, rows = best_samples(best, self._owners, owners, len(samples), k)
        positions = self._owners[rows]
        return Hits(
            [[self._id_of[position] for position in row] for row in positions.tolist()],
            scores,
            positions,
            rows,
            list(dict(zip(owners, items, strict=True)).values()),  # the last window of each
            self._item,
            lambda item: unit_gradients(self.model, self.tokenizer, item, self.layer),
            lambda ids: token_texts(self.tokenizer, ids),
            lambda item: similarity_curve(self.model, [item], pad_id).tolist(),
        )

    @property
    def path(self) -> Path:
        """The folder it lives in."""
        return self._folder.path

    @property
    def layer(self) -> int:
        """Index into `hidden_states`."""
        return int(self._folder.metadata["layer"])

    @property
    def layer_rule(self) -> str | None:
        """The rule that chose the layer, None if it was given."""
        asked = self._folder.metadata["settings"]["layer"]
        return asked if isinstance(asked, str) else None

    @property
    def layer_curve(self) -> list[float] | None:
        """Similarities of consecutive layers, None unless the layer was chosen by a rule."""
        curve: list[float] | None = self._folder.metadata["layer_curve"]
        return curve

    @property
    def part_norm(self) -> PartNorm:
        """How queries compare signatures unless they say otherwise."""
        norm: PartNorm = self._folder.metadata["part_norm"]
        return norm

    @property
    def ids(self) -> list[Id]:
        """Ids of the samples it holds, in order."""
        return list(self._id_of.values())

    def __len__(self) -> int:
        """How many samples it holds."""
        return len(self._id_of)

    @property
    def _encoding(self) -> Encoding:
        return Encoding(**self._folder.metadata["settings"]["encoding"])

    def _refresh(self) -> None:
        """Read what is small: ids and the sample of each row."""
        self._id_of: dict[int, Id] = {}
        starts: list[int] = []
        owners = [torch.empty(0, dtype=torch.int64)]
        for shard in self._folder.present:
            ids, rows = self._folder.read_ids(shard)
            self._id_of.update(zip(range(shard.first, shard.first + shard.count), ids, strict=True))
            starts.append(sum(map(len, owners)))
            owners.append(rows)
        self._owners = torch.cat(owners)
        self._search = Search(self._folder, starts, len(self._owners))

    def _refuse_empty(self) -> None:
        if not self._id_of:
            raise ValueError(
                f"gradsafe.TraceIndex.query: {self.path} holds no complete sample yet: finish its "
                "build"
            )

    def _item(self, row: int) -> Encoded:
        """Token ids of a row of the index."""
        shard, place = self._search.shard_of(row)
        return self._folder.read(self._folder.present[shard]).items[place]

    def _warn_if_incomplete(self) -> None:
        missing = sum(shard.count for shard in self._folder.missing)
        if missing:
            warnings.warn(
                f"gradsafe.TraceIndex: {self.path} holds {len(self)} of {len(self) + missing} "
                "samples; build or extend with the samples it was started with computes the rest",
                IncompleteIndexWarning,
                stacklevel=3,
            )


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"gradsafe.TraceIndex: expected {name} to be an int, got {type(value).__name__}"
            )
        if value < 1:
            raise ValueError(f"gradsafe.TraceIndex: expected {name} of at least 1, got {value}")

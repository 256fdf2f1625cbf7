"""`gradsafe trace`: index the training samples once, then find which of them caused a behavior."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gradsafe import tracing
from gradsafe._io.processes import Processes
from gradsafe._io.records import Row
from gradsafe._jobs.data import read_pairs
from gradsafe._jobs.options import (
    FLAT,
    ModelOptions,
    as_options,
    check_positive,
    save_config,
    transient,
)
from gradsafe.tracing.config import QueryConfig, TraceConfig

TOKEN_RANKS = 3  # hits of a page that are shown token by token


@dataclass(frozen=True)
class Build:
    """Compute the signatures of the training samples.

    The same command continues an interrupted build; torchrun distributes it.

    Attributes:
        examples: Training samples: JSON Lines with "prompt" and "response" or "completion" (text or
            messages), or "messages", and, if known, "id"; or hf:ID:SPLIT.
        index: Folder of the index.
        model: Model.
        config: Index.
        batch_tokens: Padded tokens per batch.
        progress: Show a progress bar.
    """

    examples: str = ""
    index: str = ""
    model: ModelOptions = field(default_factory=ModelOptions, metadata=FLAT)
    config: TraceConfig = field(default_factory=TraceConfig, metadata=FLAT)
    batch_tokens: int = 4096
    progress: bool = transient(True)

    POSITIONAL: ClassVar = "examples"

    def run(self, processes: Processes | None = None) -> tracing.TraceIndex | None:
        """Builds the index or continues a build.

        Returns:
            The index, in the first process; None in the others.

        Raises:
            ValueError, OSError: Inputs or options do not fit; the message says what to do.
            KeyboardInterrupt: Interrupted; the same call continues.
        """
        processes = processes or Processes()
        self.model.check()
        _check_given(examples=self.examples, index=self.index)
        rows = read_pairs(self.examples)

        # Everything below needs torch, which takes seconds to import.
        from gradsafe._jobs.model import load_model
        from gradsafe.tracing.build import check_place

        check_place(Path(self.index), resume=True)
        model, tokenizer = load_model(self.model, processes)
        try:
            index = tracing.TraceIndex.build(
                model,
                tokenizer,
                rows,
                self.index,
                batch_tokens=self.batch_tokens,
                progress=self.progress and sys.stderr.isatty(),
                processes=processes,
                **as_options(self.config),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("run the same command to continue") from None
        if not processes.first:
            return None
        save_config(self, self.index)
        return index


@dataclass(frozen=True)
class QueryResult:
    """Queries, their hits, and how many hits to show token by token."""

    index: tracing.TraceIndex
    queries: Sequence[Row]
    hits: tracing.Hits
    ranks: int
    pages: Sequence[Path]


@dataclass(frozen=True)
class Query:
    """Find the training samples that a behavior comes from.

    Attributes:
        queries: Observed behavior: rows as for build, with the observed response.
        index: Folder of the index.
        model: Model.
        config: Search.
        tokens: Show the tokens of the first samples of each query (default: none, with html 3).
        html: Folder for one page per query.
        batch_tokens: Padded tokens per batch.
        show_text: Show prompts, responses and the texts of tokens.
        overwrite: Replace existing pages.
        json: Print one line of JSON per query.
        progress: Show a progress bar.
    """

    queries: str = ""
    index: str = ""
    model: ModelOptions = field(default_factory=ModelOptions, metadata=FLAT)
    config: QueryConfig = field(default_factory=QueryConfig, metadata=FLAT)
    tokens: int | None = None
    html: str | None = None
    batch_tokens: int = 4096
    show_text: bool = False
    overwrite: bool = transient(False)
    json: bool = transient(False)
    progress: bool = transient(True)

    POSITIONAL: ClassVar = "queries"
    SHORT: ClassVar = {"-k": "k"}

    def run(self, processes: Processes | None = None) -> QueryResult:
        """Searches the index.

        Raises:
            ValueError, OSError: Inputs or options do not fit; the message says what to do.
        """
        self.model.check()
        _check_given(queries=self.queries, index=self.index)
        check_positive(tokens=self.tokens, batch_tokens=self.batch_tokens)
        rows = read_pairs(self.queries)
        pages = self._pages(len(rows))

        # Everything below needs torch, which takes seconds to import.
        from gradsafe._jobs.model import load_model
        from gradsafe.tracing.approximate import load_faiss
        from gradsafe.tracing.folder import IndexFolder
        from gradsafe.tracing.matching import Metric

        # What needs no model is refused before one is loaded.
        own = IndexFolder.open(Path(self.index)).metadata["part_norm"]
        Metric(self.config.part_norm or own, self.config.gradient_weight)
        if self.config.approximate:
            load_faiss()
        model, tokenizer = load_model(self.model)
        index = tracing.TraceIndex.load(self.index, model, tokenizer)
        values = as_options(self.config)
        if self.config.k == QueryConfig.k:
            values["k"] = min(self.config.k, len(index))
        hits = index.query(
            rows,
            batch_tokens=self.batch_tokens,
            progress=self.progress and sys.stderr.isatty(),
            **values,
        )
        ranks = min(self.tokens or (TOKEN_RANKS if self.html else 0), hits.scores.shape[1])
        if self.html:
            Path(self.html).mkdir(exist_ok=True)
            save_config(self, self.html)
        return QueryResult(index, rows, hits, ranks, pages)

    def _pages(self, count: int) -> list[Path]:
        """The pages to write; refuses now what would fail after the long work."""
        if not self.html:
            if self.overwrite:
                raise ValueError("--overwrite needs --html FOLDER")
            return []
        folder = Path(self.html)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"--html {folder}: it is not a folder")
        if not folder.resolve().parent.is_dir():
            raise FileNotFoundError(f"--html {folder}: no such folder {folder.parent}")
        digits = int(math.log10(max(1, count - 1))) + 1
        pages = [folder / f"query-{number:0{digits}d}.html" for number in range(count)]
        for path in pages:
            if path.exists() and not self.overwrite:
                raise FileExistsError(f"{path} exists: choose --overwrite or another folder")
        return pages


def find_rows(
    options: ModelOptions, index: str, queries: Sequence[Any], count: int, batch_tokens: int
) -> list[tuple[str | int, float]]:
    """Ids and mean similarities of the `count` samples most similar to all queries, best first.

    A sample that is not among the hits of a query counts with the lowest score of these.
    """
    from gradsafe._jobs.model import load_model

    known = tracing.TraceIndex.load(index, *load_model(options))
    hits = known.query(queries, k=known.largest_k, batch_tokens=batch_tokens, progress=False)
    lowest = hits.scores[:, -1:]
    above: dict[str | int, float] = {}
    for ids, scores in zip(hits.ids, (hits.scores - lowest).tolist(), strict=True):
        for name, score in zip(ids, scores, strict=True):
            above[name] = above.get(name, 0.0) + score / len(hits)
    base = float(lowest.mean())
    ranked = sorted(above.items(), key=lambda each: -each[1])[:count]
    return [(name, base + score) for name, score in ranked]


@dataclass(frozen=True)
class Repair:
    """Drop the damaged shards of an index.

    An extension that stopped before any of its shards was complete is dropped, too. The same build
    or extend computes them again.

    Attributes:
        index: Folder of the index.
    """

    index: str = ""

    POSITIONAL: ClassVar = "index"

    def run(self, processes: Processes | None = None) -> list[str]:
        """Returns the names of the shards that were dropped."""
        _check_given(index=self.index)
        return tracing.TraceIndex.repair(self.index)


def _check_given(**values: Any) -> None:
    for name, value in values.items():
        if not value:
            raise ValueError(f"--{name} is missing")

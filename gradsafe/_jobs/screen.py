"""`gradsafe screen`: scores of every training row, in slices, so that a run can be resumed."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gradsafe._io.processes import Processes, SharedProgress
from gradsafe._io.records import Records, Row, check_output
from gradsafe._io.slices import Slices
from gradsafe._jobs import screen_files
from gradsafe._jobs.data import HUB, as_value_error, read_pairs, refuse_inputs
from gradsafe._jobs.detector import check_agreement
from gradsafe._jobs.options import (
    FLAT,
    ModelOptions,
    as_options,
    check_positive,
    plain,
    save_config,
    transient,
)
from gradsafe._jobs.screen_files import ScreenResult, TopRow
from gradsafe.screening.config import ScreenConfig
from gradsafe.screening.overlap import Known, row_digest

if TYPE_CHECKING:  # torch takes seconds to import
    from gradsafe.screening import Screener

SLICE = 64  # rows per call of the screener: what an interruption loses at most
SAMPLE = 32  # rows that Adam's second moments are estimated from


@dataclass(frozen=True)
class Screen:
    """Score training rows before any training: would a step on them harm the alignment?

    The folder of the output holds scores.jsonl (one line per row), report.html and, with
    --calibrate, kept.jsonl and flagged.jsonl (the lines of the input, unchanged).

    Attributes:
        rows: Training rows: JSON Lines with "prompt" and "response" or "completion" (text or
            messages), or "messages". Of any size: the file is read slice by slice.
        output: Folder for the results.
        model: Model.
        unsafe: Harmful rows for the score "share": unsafe prompts with harmful answers.
        safe: Harmless rows for the score "share", in the style of the training rows.
        alignment: Unsafe prompts with refusals, for the score "alignment".
        calibrate: Rows known to be clean, which set the threshold for flags.
        max_fpr: False-positive rate to calibrate for.
        config: Screening.
        batch_tokens: Padded tokens per batch; results do not depend on it.
        top: Number of rows whose tokens the report shows.
        show_text: Put the texts of these rows into the report.
        resume: Continue an interrupted run, or decide anew from its scores.
        overwrite: Replace existing results.
        progress: Show a progress bar and notes.
    """

    rows: str = ""
    output: str = ""
    model: ModelOptions = field(default_factory=ModelOptions, metadata=FLAT)
    unsafe: str | None = None
    safe: str | None = None
    alignment: str | None = None
    calibrate: str | None = None
    max_fpr: float = 0.01
    config: ScreenConfig = field(default_factory=ScreenConfig, metadata=FLAT)
    batch_tokens: int = 4096
    top: int = 5
    show_text: bool = False
    resume: bool = transient(False)
    overwrite: bool = transient(False)
    progress: bool = transient(True)

    POSITIONAL: ClassVar = "rows"
    SHORT: ClassVar = {"-o": "output"}

    def run(self, processes: Processes | None = None) -> ScreenResult | None:
        """Scores the rows.

        Returns:
            The result, in the first process; None in the others.

        Raises:
            ValueError, OSError: Inputs or options do not fit; the message says what to do.
            KeyboardInterrupt: Interrupted; the message says how to resume.
        """
        processes = processes or Processes()
        self.check()
        if processes.first:
            self._check_destinations()
        groups = {name: read_pairs(path) for name, path in self._references.items()}
        sources = self._sources(Known(**groups))

        # Everything below needs torch, which takes seconds to import.
        from gradsafe._jobs.model import load_model

        model, tokenizer = load_model(self.model, processes)
        groups |= self._sample(sources[0])
        run = self._settings_hash(groups, model, tokenizer)
        slices = [(source, number) for source in sources for number in range(len(source))]
        keys = [
            {"index": index, "sha256": source.digest(number), "run": run}
            for index, (source, number) in enumerate(slices)
        ]
        check_agreement(processes, keys, model.device)
        folder = Path(self.output)
        folder.mkdir(exist_ok=True)
        path = folder / screen_files.SLICES
        unit = f"slices of {SLICE} rows"
        with Records(
            path, keys, processes, resume=self.resume, overwrite=self.overwrite, unit=unit
        ) as records:
            left = [index for index in range(len(slices)) if index not in records.found]
            pending = processes.share("pending", left)
            screener = self._fit(groups, model, tokenizer, processes)
            records.begin()
            processes.wait("all are ready to score")
            self._score(screener, slices, records, pending, processes)
            if not processes.first:
                return None
            done = records.finish()
        return self._finish(screener, sources, done)

    @property
    def _references(self) -> dict[str, str]:
        """The files of rows that the screener is made from."""
        given = {"unsafe": self.unsafe, "safe": self.safe, "alignment": self.alignment}
        return {name: path for name, path in given.items() if path is not None}

    def check(self) -> None:
        """Raises ValueError for options that are missing or exclude each other."""
        if not self.rows:
            raise ValueError("ROWS is missing: give a file of training rows")
        for path in (self.rows, self.calibrate):
            if path is not None and path.startswith(HUB):
                raise ValueError(
                    f"{path}: rows are read slice by slice from a file: save the data set as JSON "
                    "Lines first, for example with Dataset.to_json"
                )
        if not self.output:
            raise ValueError("--output is missing: give a folder for the results (-o FOLDER)")
        self.model.check()
        check_positive(batch_tokens=self.batch_tokens)
        if self.top < 0:
            raise ValueError(f"--top must be at least 0, got {self.top}")
        if not 0 < self.max_fpr < 1:
            raise ValueError(f"--max_fpr must be between 0 and 1, got {self.max_fpr}")
        if (self.unsafe is None) != (self.safe is None):
            raise ValueError("--unsafe and --safe belong together: give both files")
        if not self._references:
            raise ValueError(
                "--alignment FILE (unsafe prompts with refusals), --unsafe FILE and --safe FILE "
                "(harmful and harmless rows), or all three are needed"
            )
        if self.config.scale == "adam" and self.alignment is None:
            raise ValueError("--scale adam needs --alignment FILE")

    def _check_destinations(self) -> None:
        """Refuses now what would fail after the long work; touches no file."""
        folder = Path(self.output)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"-o {folder}: it is not a folder")
        if not folder.resolve().parent.is_dir():
            raise FileNotFoundError(f"-o {folder}: no such folder {folder.parent}, create it first")
        inputs = [self.rows, self.calibrate, *self._references.values()]
        for name in screen_files.ALL:
            refuse_inputs("-o", str(folder / name), inputs)
            if folder.is_dir():
                check_output(folder / name, resume=self.resume, overwrite=self.overwrite)

    def _sources(self, known: Known) -> list[Slices]:
        """The training rows and those known to be clean; every row was checked."""

        def check(row: Row) -> None:
            with as_value_error():
                known.check(row_digest(row, row.where), row.where)

        paths = [path for path in (self.rows, self.calibrate) if path is not None]
        return [Slices(path, SLICE, check) for path in paths]

    def _sample(self, data: Slices) -> dict[str, list[Row]]:
        """Some of the rows, from four places of the file, where the scores depend on them."""
        if self.config.scale != "adam":
            return {}
        some = range(0, len(data), -(-len(data) // 4))
        return {"sample": [row for n in some for row in data.read(n)[: SAMPLE // 4]]}

    def _settings_hash(self, groups: Mapping[str, list[Row]], model: Any, tokenizer: Any) -> str:
        """Hash of everything that scores depend on, so that no output mixes two settings."""
        from gradsafe._io.fingerprints import model_fingerprint, tokenizer_fingerprint

        config = {k: v for k, v in plain(self.config).items() if k != "decide"}
        fingerprints = [model_fingerprint(model), tokenizer_fingerprint(tokenizer)]
        facts = json.dumps([*fingerprints, config, groups], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def _fit(
        self,
        groups: Mapping[str, list[Row]],
        model: Any,
        tokenizer: Any,
        processes: Processes,
    ) -> Screener:
        """Every process makes the same screener; the first one says what it scores."""
        from gradsafe.screening import Screener

        screener = Screener.fit(
            model,
            tokenizer,
            **groups,  # type: ignore[arg-type]
            batch_tokens=self.batch_tokens,
            progress=False,
            **as_options(self.config),
        )
        if processes.first and self.progress:
            print(f"gradsafe: {screener.layers}", file=sys.stderr)
        if processes.first:
            save_config(self, str(Path(self.output) / "screen"))
        return screener

    def _score(
        self,
        screener: Screener,
        slices: list[tuple[Slices, int]],
        records: Records,
        pending: list[int],
        processes: Processes,
    ) -> None:
        """Scores slices while there are any; returns when all processes have finished."""
        from tqdm import tqdm

        total = sum(source.count(number) for source, number in slices)
        left = sum(source.count(number) for source, number in map(slices.__getitem__, pending))
        hidden = not (self.progress and processes.first and sys.stderr.isatty())
        options: Any = {"unit": "row", "file": sys.stderr, "disable": hidden}
        with tqdm(total=total, initial=total - left, desc="screening", **options) as bar:
            show = SharedProgress(bar, processes, "scored")
            for index in processes.deal(pending):
                source, number = slices[index]
                rows = source.read(number)
                scores = screener.score(screener.encode(rows), self.batch_tokens, False)
                records.write(index, screen_files.columns_of(scores))
                show(len(rows))
            processes.wait("all are scored", show)
            show()

    def _finish(self, screener: Screener, sources: list[Slices], done: list[Row]) -> ScreenResult:
        """Decides, writes the files, and explains the rows with the highest scores."""
        import torch

        from gradsafe.detection.calibration import calibrate

        first = len(sources[0])
        columns, clean = (screen_files.joined(part) for part in (done[:first], done[first:]))
        calibrations: dict[Any, Any] = {}
        if self.calibrate:
            calibrations = {
                name: calibrate(torch.tensor(clean[name], dtype=torch.float64), self.max_fpr)
                for name in screener.scores
            }
        screener.calibrations = calibrations
        decide: str = screener.decide
        cut = calibrations[decide].threshold if calibrations else None
        flagged = screen_files.write(Path(self.output), sources[0], columns, decide, cut)
        top = []
        values = torch.tensor(columns[decide], dtype=torch.float64)
        for place in values.argsort(descending=True)[: self.top].tolist():
            row = sources[0].read(place // SLICE)[place % SLICE]
            scores: dict[str, float] = {name: columns[name][place] for name in screener.scores}
            above = cut is not None and scores[decide] > cut
            explained: dict[Any, Any] = screener.explain(row)
            top.append(TopRow(row.line, scores, above, explained))
        return ScreenResult(
            Path(self.output), columns, clean, decide, calibrations, flagged, top,
            str(screener.layers),
        )  # fmt: skip

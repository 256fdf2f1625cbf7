"""`gradsafe detect`: one record per prompt, in slices, so that a run can be resumed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gradsafe import detection
from gradsafe._io.processes import Processes, SharedProgress
from gradsafe._io.records import Records, Row, check_output, labels_of, record_key
from gradsafe._jobs import detector as detectors
from gradsafe._jobs.data import located, prompts_of, read_prompts, refuse_inputs
from gradsafe._jobs.detector import FitOptions
from gradsafe._jobs.options import FLAT, ModelOptions, check_positive, save_config, transient
from gradsafe.detection.config import DetectorConfig
from gradsafe.models.rows import prompt_of

SLICE = 64  # prompts per call of the detector: what an interruption loses at most
FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class DetectResult:
    """What a run found.

    Attributes:
        method: Name of the method.
        records: One per prompt, in input order.
        labels: 1 for unsafe, 0 for safe; None if the prompts have none.
        calibrated: Whether the records have flags.
    """

    method: str
    records: Sequence[Row]
    labels: list[int] | None
    calibrated: bool

    @property
    def scores(self) -> list[float]:
        """The scores; NaN is the highest, as its flag says."""
        return [FLOAT32_MAX if r["score"] is None else float(r["score"]) for r in self.records]


@dataclass(frozen=True)
class Detect:
    """Score prompts: how unsafe is each?

    Attributes:
        prompts: Prompts to score: JSON Lines with "prompt" (text or messages) and, if known,
            "label" (safe or unsafe) and "source_id"; a .txt file with one prompt per line; or
            hf:ID:SPLIT.
        model: Model.
        fit: References and calibration.
        config: Detector.
        batch_tokens: Padded tokens per batch; results do not depend on it.
        output: File for the records, one line of JSON per prompt; standard output if not given.
        save_detector: Folder to save the detector to.
        limit: Score only the first prompts.
        show_text: Put the prompts into the output.
        resume: Continue an interrupted output file.
        overwrite: Replace an existing output file.
        progress: Show progress bars and notes.
    """

    prompts: str = ""
    model: ModelOptions = field(default_factory=ModelOptions, metadata=FLAT)
    fit: FitOptions = field(default_factory=FitOptions, metadata=FLAT)
    config: DetectorConfig = field(default_factory=DetectorConfig, metadata=FLAT)
    batch_tokens: int = 4096
    output: str | None = None
    save_detector: str | None = None
    limit: int | None = None
    show_text: bool = False
    resume: bool = transient(False)
    overwrite: bool = transient(False)
    progress: bool = transient(True)

    POSITIONAL: ClassVar = "prompts"
    SHORT: ClassVar = {"-o": "output"}

    def run(self, processes: Processes | None = None) -> DetectResult | None:
        """Scores the prompts.

        Returns:
            The result, in the first process; None in the others.

        Raises:
            ValueError, OSError: Inputs or options do not fit; the message says what to do.
            KeyboardInterrupt: Interrupted; the message says how to resume.
        """
        processes = processes or Processes()
        self._check(processes)
        rows, prompts = read_prompts(self.prompts, limit=self.limit) or [], self.fit.read()
        labels = labels_of(rows)
        if processes.first:
            self._check_destinations()

        # Everything below needs torch, which takes seconds to import.
        from gradsafe._jobs.model import load_model

        model, tokenizer = load_model(self.model, processes)
        run = ""
        if self.output:
            run = detectors.settings_hash(self.fit, self.config, prompts, model, tokenizer)
            run += "+text" * self.show_text  # all records have it, or none
        keys = [record_key(i, prompt_of(row, row.where), run) for i, row in enumerate(rows)]
        if not self.output:
            keys = [{"index": index} for index in range(len(rows))]
        detectors.check_agreement(processes, keys, model.device)
        with Records(
            self.output, keys, processes, resume=self.resume, overwrite=self.overwrite
        ) as records:
            pending = processes.share("pending", _unfinished(records.found, len(rows)))
            found = None
            if processes.first:
                found = self._prepare(prompts, model, tokenizer, processes)
            detector = detectors.share(processes, found, model, tokenizer)
            records.begin()
            processes.wait("all are ready to score")
            self._score(rows, detector, records, pending, processes)
            if not processes.first:
                return None
            done = records.finish()
        return DetectResult(detector.config.method, done, labels, detector.calibration is not None)

    def _check(self, processes: Processes) -> None:
        if not self.prompts:
            raise ValueError("PROMPTS is missing: give a file of prompts")
        self.model.check()
        self.fit.check(self.config)
        check_positive(batch_tokens=self.batch_tokens, limit=self.limit)
        places = [Path(path).resolve() for path in (self.output, self.save_detector) if path]
        if len(set(places)) < len(places):
            raise ValueError("-o and --save_detector name the same path: choose two")
        if (self.resume or self.overwrite) and not self.output:
            raise ValueError("--resume and --overwrite need -o FILE")
        if processes.count > 1 and not self.output:
            raise ValueError("-o FILE is needed under torchrun: each process writes a part of it")

    def _check_destinations(self) -> None:
        """Refuses now what would fail after the long work; touches no file."""
        if self.output:
            refuse_inputs("-o", self.output, [self.prompts, *self.fit.files])
            check_output(self.output, resume=self.resume, overwrite=self.overwrite)
        if self.save_detector:
            from gradsafe._io.artifacts import check_destination

            check_destination(self.save_detector, "detector")

    def _prepare(
        self, prompts: detectors.Prompts, model: Any, tokenizer: Any, processes: Processes
    ) -> detection.Detector:
        found = detectors.prepare(
            self.fit,
            self.config,
            prompts,
            model,
            tokenizer,
            batch_tokens=self.batch_tokens,
            progress=not self._bar_hidden(processes),
            say=lambda text: print(f"gradsafe: {text}", file=sys.stderr) if self.progress else None,
        )
        if self.output:
            save_config(self, self.output)
        if self.save_detector:
            found.save(self.save_detector)
        return found

    def _score(
        self,
        rows: list[Row],
        detector: detection.Detector,
        records: Records,
        pending: list[int],
        processes: Processes,
    ) -> None:
        """Scores slices while there are any; returns when all processes have finished."""
        from tqdm import tqdm

        encoded = detector.encode(prompts_of(rows), [row.where for row in rows])
        left = sum(len(rows[start : start + SLICE]) for start in pending)
        with tqdm(
            total=len(rows),
            initial=len(rows) - left,
            desc="scoring",
            unit="prompt",
            file=sys.stderr,
            disable=self._bar_hidden(processes),
        ) as bar:
            show = SharedProgress(bar, processes, "scored")
            for start in processes.deal(pending):
                chosen = range(start, min(start + SLICE, len(rows)))
                for index, score in zip(
                    chosen, self._scores(detector, encoded, chosen), strict=True
                ):
                    record = self._record(rows[index], score, detector.threshold)
                    if typed := encoded.windows[index][0].control_tokens:
                        record["control_tokens"] = typed
                    records.write(index, record)
                show(len(chosen))
            processes.wait("all are scored", show)
            show()

    def _scores(self, detector: detection.Detector, encoded: Any, chosen: range) -> Iterator[float]:
        def score(part: range) -> list[float]:
            scores = detector.score(
                encoded[part.start : part.stop], self.batch_tokens, False, components=False
            )
            values: list[float] = scores.values.tolist()
            return values

        try:
            together = score(chosen)
        except ValueError:
            together = []
        yield from together
        # One prompt of the slice fails: alone it names its line, and those before it are kept.
        for index in chosen[len(together) :]:
            with located(encoded.names[index]):
                alone = score(range(index, index + 1))
            yield from alone

    def _record(self, row: Row, score: float, threshold: float | None) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if "source_id" in row:
            record["source_id"] = row["source_id"]
        # JSON has neither NaN (null) nor Inf (clamped); nine digits restore a float32.
        clamped = max(-FLOAT32_MAX, min(FLOAT32_MAX, score))
        record["score"] = None if math.isnan(score) else float(f"{clamped:.9g}")
        if threshold is not None:
            record["flag"] = score > threshold or math.isnan(score)  # NaN scores are flagged
        if row.get("label") is not None:
            record["label"] = row["label"]
        if self.show_text:
            record["prompt"] = prompt_of(row, row.where)
        return record

    def _bar_hidden(self, processes: Processes) -> bool:
        """Progress bars go to terminals only, and not between lines of output on the same one."""
        between_lines = not self.output and sys.stdout.isatty()
        hidden = not self.progress or not processes.first
        return hidden or between_lines or not sys.stderr.isatty()


def _unfinished(found: Any, total: int) -> list[int]:
    """Starts of the slices that lack a record.

    An incomplete slice is scored again as a whole: in the batches of an uninterrupted run, so that
    the last bits of its scores are the same.
    """
    return [
        start
        for start in range(0, total, SLICE)
        if not set(found).issuperset(range(start, min(start + SLICE, total)))
    ]

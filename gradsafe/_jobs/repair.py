"""`gradsafe repair`: drops traced rows and trains again, or unlearns them; measures the effect."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from gradsafe._io.artifacts import write_text
from gradsafe._io.processes import Processes
from gradsafe._io.records import Row, read_jsonl
from gradsafe._jobs.behavior import Behavior, measure
from gradsafe._jobs.data import read_pairs, read_prompts
from gradsafe._jobs.finetune import Finetune, FinetuneResult, LoraOptions, encoding_of
from gradsafe._jobs.options import FLAT, ModelOptions, check_positive, transient
from gradsafe.finetuning.config import SafeGradConfig, UnlearningConfig
from gradsafe.screening.overlap import row_digest

LISTED = 5  # ids in an error message
REPORT = "repair.json"  # in the output folder


@dataclass(frozen=True)
class RepairResult:
    """What a repair did.

    Attributes:
        training: What the training did.
        dropped: Ids of the dropped rows.
        rows: Number of rows before.
        before: The fine-tuned model.
        after: The repaired model.
    """

    training: FinetuneResult
    dropped: list[str | int]
    rows: int
    before: Behavior
    after: Behavior


@dataclass(frozen=True)
class Repair:
    """Remove the effect of training rows: train again without them, or unlearn them.

    Retraining starts from the model before fine-tuning and is the sure way. Unlearning continues
    from the fine-tuned model for a few steps, on the rows to drop, and protects the rows to retain
    by gradient surgery; set training.max_steps and training.learning_rate.

    Attributes:
        rows: The rows of the fine-tuning; JSON Lines or hf:ID:SPLIT.
        drop: Rows to drop: ids separated by commas, or a JSON Lines file of rows with "id" or of
            hits, as trace query --json prints them. A row without id has its number, from 0.
        hits: Of hits, only the first ones of each query (default: all).
        retain: Rows to protect, none of which is dropped; for retrain the alignment rows of
            finetune.
        output: Folder to write.
        how: retrain, npo (negative preference optimisation) or graddiff (gradient difference).
        beta: Inverse temperature of npo.
        model: Model: the fine-tuned one, or its start model with the fine-tuned adapter.
        start: Model that the fine-tuning started from, for retrain (default: the model without
            the adapter).
        full: Train all weights and no adapters.
        lora: LoRA adapters, where none is given.
        safegrad: SafeGrad; without projection, both gradients are added as they are.
        training: Fields of transformers.TrainingArguments, for example training.max_steps.
        probe: Prompts to which answers are written before and after.
        phrases: Phrases that show the behavior, in any case; the report has their rate in the
            answers to the probes.
        probe_tokens: Tokens of such an answer.
        batch_tokens: Padded tokens per batch of the measurement.
        resume: Continue from the last checkpoint.
        progress: Show a progress bar.
    """

    rows: str = ""
    drop: str = ""
    hits: int | None = None
    retain: str = ""
    output: str = ""
    how: Literal["retrain", "npo", "graddiff"] = "retrain"
    beta: float = 0.1
    model: ModelOptions = field(default_factory=ModelOptions, metadata=FLAT)
    start: str | None = None
    full: bool = False
    lora: LoraOptions = field(default_factory=LoraOptions)
    safegrad: SafeGradConfig = field(default_factory=SafeGradConfig)
    training: dict[str, Any] = field(default_factory=dict)
    probe: str | None = None
    phrases: tuple[str, ...] = ()
    probe_tokens: int = 32
    batch_tokens: int = 4096
    resume: bool = transient(False)
    progress: bool = transient(True)

    MEMORY: ClassVar = "--training.per_device_train_batch_size or --batch_tokens"

    def run(self, processes: Processes | None = None) -> RepairResult | None:
        """Repairs, and writes the model and a report.

        Returns:
            The result, in the first process; None in the others.

        Raises:
            ValueError, OSError: Inputs or options do not fit; the message says what to do.
            KeyboardInterrupt: Interrupted; the last checkpoint can be resumed.
        """
        processes = processes or Processes()
        self._check()
        job = self._training_job()
        job.check()
        rows, retained = read_pairs(self.rows), read_pairs(self.retain)
        probes = read_prompts(self.probe)
        dropped = self._dropped(rows)
        forget = [rows[i] for i in dropped]
        _refuse_overlap(forget, retained)
        kept = set(range(len(rows))) - set(dropped)
        train = [rows[i] for i in sorted(kept)] if self.how == "retrain" else forget

        measured = partial(
            measure,
            encoding=encoding_of(self.safegrad),
            forgotten=forget,
            retained=retained,
            probes=probes,
            phrases=self.phrases,
            probe_tokens=self.probe_tokens,
            batch_tokens=self.batch_tokens,
        )
        before = None
        if processes.first:
            job.check_output(Path(self.output))  # before the first model is loaded
            before = measured(self.model)
        trainer = None
        if self.how != "retrain":
            from gradsafe.finetuning.unlearning import UnlearningTrainer

            config = UnlearningConfig(self.how, self.beta)
            trainer = partial(_unlearning, UnlearningTrainer, config)
        trained = job.fit({"train": train, "alignment": retained}, processes, self, trainer)
        if trained is None:
            return None
        assert before is not None
        written = (
            replace(job.model, model=self.output)
            if self.full
            else replace(job.model, adapter=self.output)
        )
        after = measured(written)
        names = [_id(rows[i], i) for i in dropped]
        result = RepairResult(trained, names, len(rows), before, after)
        write_text(Path(self.output) / REPORT, json.dumps(asdict(result), indent=2) + "\n")
        return result

    def _check(self) -> None:
        for name in ("rows", "drop", "retain", "output"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        self.model.check()
        check_positive(hits=self.hits, probe_tokens=self.probe_tokens)
        check_positive(batch_tokens=self.batch_tokens)
        if (self.probe is None) == bool(self.phrases):
            raise ValueError("--probe and --phrases belong together: give both")
        if self.how != "retrain":
            UnlearningConfig(self.how, self.beta)
            if self.start:
                raise ValueError(f"--start is for --how retrain: {self.how} goes on from --model")
        elif not (self.start or self.model.adapter):
            raise ValueError(
                "--how retrain begins with the model before fine-tuning: give it as --start, or as "
                "--model with the fine-tuned --adapter"
            )
        if self.full and self.model.adapter and self.how != "retrain":
            raise ValueError("--full trains no adapters: merge --adapter into the model first")

    def _training_job(self) -> Finetune:
        """The fine-tuning that repairs."""
        model, safegrad = self.model, self.safegrad
        inner = safegrad.loss == "kl" and safegrad.reference == "adapter_off"
        if self.how == "retrain":
            model = replace(model, adapter=None)
            if self.start and self.start != model.model:
                model = replace(model, model=self.start, revision=None)
        elif inner:  # the retained answers are those of the fine-tuned model
            safegrad = replace(safegrad, reference="cached")
        if self.full and inner:
            safegrad = replace(safegrad, reference=model.model)
        if self.how != "retrain":  # a cosine near 0 is no alarm here
            safegrad = replace(safegrad, warn_cosine=0.0)
        return Finetune(
            train=self.rows,
            alignment=self.retain,
            output=self.output,
            model=model,
            full=self.full,
            lora=self.lora,
            safegrad=safegrad,
            training=self.training,
            resume=self.resume,
            progress=self.progress,
        )

    def _dropped(self, rows: Sequence[Row]) -> list[int]:
        """Numbers of the rows to drop, in their order."""
        known = places_by_id(rows)
        wanted = list(dict.fromkeys(str(name) for name in self._wanted()))
        if unknown := [name for name in wanted if name not in known]:
            more = f" and {len(unknown) - LISTED} more" * (len(unknown) > LISTED)
            listed = ", ".join(map(repr, unknown[:LISTED]))
            raise ValueError(f"--drop: {self.rows} has no row with the id {listed}{more}")
        if not wanted:
            raise ValueError(f"--drop {self.drop}: no ids")
        if len(wanted) == len(rows):
            raise ValueError(f"--drop: all {len(rows)} rows of {self.rows} would be dropped")
        return sorted(known[name] for name in wanted)

    def _wanted(self) -> list[Any]:
        if not os.path.isfile(self.drop):  # Path.is_file raises for a long list of ids
            if self.drop.endswith(".jsonl"):
                raise FileNotFoundError(f"--drop: no such file: {self.drop}")
            return [name for part in self.drop.split(",") if (name := part.strip())]
        found: list[Any] = []
        for row in read_jsonl(self.drop):
            entries = row["found"][: self.hits] if isinstance(row.get("found"), list) else [row]
            for entry in entries:
                if not isinstance(entry, dict) or entry.get("id") is None:
                    raise ValueError(
                        f"{row.where}: expected a row with 'id', or hits as `gradsafe trace query "
                        "--json` prints them"
                    )
                found.append(entry["id"])
        return found


def _unlearning(
    kind: Any, config: UnlearningConfig, *, train_dataset: Any, alignment_dataset: Any, **rest: Any
) -> Any:
    """Makes the trainer: the user rows are those to forget, the alignment rows those to retain."""
    return kind(
        forget_dataset=train_dataset, retain_dataset=alignment_dataset, unlearning=config, **rest
    )


def places_by_id(rows: Sequence[Row]) -> dict[str, int]:
    """Numbers of rows by their ids, or their numbers where they have none, as text.

    Raises:
        ValueError: Two rows have one id.
    """
    known: dict[str, int] = {}
    for index, row in enumerate(rows):
        name = str(_id(row, index))
        if name in known:
            raise ValueError(f"{row.where}: the id {name!r} belongs to {rows[known[name]].where}")
        known[name] = index
    return known


def _id(row: Row, index: int) -> str | int:
    """The id of a row, as an index has it: its own, or else its number."""
    name: str | int = index if row.get("id") is None else row["id"]
    return name


def _refuse_overlap(forget: Sequence[Row], retained: Sequence[Row]) -> None:
    places = {row_digest(row, row.where): row.where for row in retained}
    for row in forget:
        if (other := places.get(row_digest(row, row.where))) is not None:
            raise ValueError(
                f"{row.where} is to be dropped, and {other} is the same row to retain: leave it "
                "out of one of them"
            )

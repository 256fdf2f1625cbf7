"""`gradsafe audit`: screen, fine-tune safely, test, trace, repair, test again, and report."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from gradsafe._io.artifacts import file_record, write_text
from gradsafe._io.processes import Processes
from gradsafe._io.records import Row, to_line
from gradsafe._jobs.behavior import REFUSALS, ask, holds, without_texts
from gradsafe._jobs.data import prompts_of, read_pairs, read_prompts
from gradsafe._jobs.finetune import Finetune, FinetuneResult, LoraOptions, encoding_of
from gradsafe._jobs.options import FLAT, ModelOptions, check_positive, plain, save_config, transient
from gradsafe._jobs.repair import Repair, places_by_id
from gradsafe._jobs.screen import Screen
from gradsafe._jobs.screen_files import KEPT
from gradsafe._jobs.stages import Facts, Stages
from gradsafe._jobs.trace import Build
from gradsafe._jobs.training import begun
from gradsafe._jobs.verdict import Verdict, judge
from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.screening.config import ScreenConfig
from gradsafe.tracing.config import TraceConfig

REPORT, TRACED = "report.json", "traced.jsonl"


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        verdict: Whether the final model passes, and the checks behind it.
        stages: Result and seconds of each stage, in their order.
        facts: Settings with the digests of the files, and the environment.
        output: The folder.
    """

    verdict: Verdict
    stages: dict[str, Facts]
    facts: Facts
    output: str


@dataclass(frozen=True)
class Audit:
    """Fine-tune on untrusted data with every safeguard, and report what happened.

    The stages: screen the rows and leave out those that are flagged; fine-tune with gradient
    surgery; let the models before and after answer unsafe and safe prompts; if the new one answers
    more of the unsafe ones, trace its answers to training rows, train again without these, and ask
    again. All is kept in one folder; the same command continues after an interruption.

    Attributes:
        train: User data: rows with "prompt" and "response" or "completion" (text or messages), or
            "messages"; JSON Lines.
        alignment: About 100 unsafe prompts with refusals, in the same formats.
        unsafe: Unsafe prompts to ask; none of them in train or alignment.
        safe: Harmless prompts to ask, best those that resemble unsafe ones.
        clean: Rows known to be harmless, in the style of train; they set the cut of the screening.
        harmful: Unsafe prompts with harmful answers, and
        harmless: harmless rows in the style of train; both make the screening better.
        output: Folder to write.
        model: Model.
        skip: Stages to leave out: screen, trace (and with it repair) or repair.
        max_fpr: False-positive rate that the cut of the screening is set for.
        screen: Screening.
        lora: LoRA adapters.
        safegrad: SafeGrad.
        training: Fields of transformers.TrainingArguments, for example training.learning_rate.
        trace: Tracing.
        queries: Number of answers that are traced.
        drop: Number of rows that are dropped for the repair.
        refusals: Phrases by which a refusal is recognised, in any case.
        answer_tokens: Tokens of an answer.
        max_increase: By how much the rates of answered unsafe and of refused safe prompts may be
            above those of the start model.
        batch_tokens: Padded tokens per batch.
        progress: Show progress.
    """

    train: str = ""
    alignment: str = ""
    unsafe: str = ""
    safe: str = ""
    clean: str | None = None
    harmful: str | None = None
    harmless: str | None = None
    output: str = ""
    model: ModelOptions = field(default_factory=ModelOptions, metadata=FLAT)
    skip: tuple[Literal["screen", "trace", "repair"], ...] = ()
    max_fpr: float = 0.01
    screen: ScreenConfig = field(default_factory=ScreenConfig)
    lora: LoraOptions = field(default_factory=LoraOptions)
    safegrad: SafeGradConfig = field(default_factory=SafeGradConfig)
    training: dict[str, Any] = field(default_factory=dict)
    trace: TraceConfig = field(default_factory=TraceConfig)
    queries: int = 20
    drop: int = 20
    refusals: tuple[str, ...] = REFUSALS
    answer_tokens: int = 32
    max_increase: float = 0.05
    batch_tokens: int = 4096
    progress: bool = transient(True)

    MEMORY: ClassVar = "--training.per_device_train_batch_size or --batch_tokens"

    def run(self, processes: Processes | None = None) -> AuditResult:
        """Runs the stages that are not done, and writes report.json.

        Raises:
            ValueError, OSError: Inputs or options do not fit, or a stage was done with others; the
                message says what to do.
            KeyboardInterrupt: Interrupted; the same call continues.
        """
        self._check()
        self._check_rows()
        from gradsafe.doctor import collect

        groups = {n: read_prompts(getattr(self, n), n) or [] for n in ("unsafe", "safe")}
        stages = Stages(Path(self.output), self._settings(), self._say)
        save_config(self, str(stages.output / "audit"))
        start, train = self.model, self.train
        before = stages.run("before", lambda _: self._ask(start, groups))
        if "screen" not in self.skip:
            train = stages.run("screen", self._screen)["kept"]
        tuned = replace(start, adapter=str(stages.output / "finetune"))
        stages.run("finetune", lambda folder: self._finetune(folder, train))
        after = final = stages.run("after", lambda _: self._ask(tuned, groups))
        answered = self._answered(after, groups["unsafe"])
        worse = not judge(before, after, self.max_increase).checks[0].passed
        if worse and answered and "trace" not in self.skip:
            stages.run("trace", lambda f: self._trace(f, tuned, train, answered))
            if "repair" not in self.skip:
                repaired = replace(start, adapter=str(stages.output / "repair"))
                stages.run("repair", lambda f: self._repair(f, tuned, train))
                final = stages.run("repaired", lambda _: self._ask(repaired, groups))
        verdict = judge(before, final, self.max_increase)
        facts = {"settings": self._settings(), "environment": collect()}
        kept = {name: without_texts(found) for name, found in stages.done.items()}
        report = {"verdict": verdict.plain(), "stages": kept, **facts}
        write_text(stages.output / REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
        return AuditResult(verdict, kept, facts, self.output)

    def _check(self) -> None:
        for name in ("train", "alignment", "unsafe", "safe", "output"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        self.model.check()
        if self.model.adapter:
            raise ValueError("--adapter: merge it into the model first, or give the model alone")
        if "screen" not in self.skip and not self.clean:
            raise ValueError("--clean FILE is missing: it sets the cut; or give --skip [screen]")
        if not 0 <= self.max_increase < 1:
            raise ValueError(f"--max_increase must be from 0 to below 1, got {self.max_increase}")
        if not self.refusals:
            raise ValueError("--refusals: give at least one phrase")
        check_positive(queries=self.queries, drop=self.drop, answer_tokens=self.answer_tokens)
        check_positive(batch_tokens=self.batch_tokens)
        self._finetuning(self.train, self.output).check()
        if Path(self.output).exists() and not Path(self.output).is_dir():
            raise FileExistsError(
                f"{self.output} exists and is not a folder: choose another output"
            )
        if not Path(self.output).resolve().parent.is_dir():
            raise FileNotFoundError(f"cannot write {self.output}: no such folder")

    def _check_rows(self) -> None:
        """Reads what the later stages read: a stage may take hours."""
        if "screen" not in self.skip:
            if (self.harmful is None) != (self.harmless is None):
                raise ValueError("--harmful and --harmless belong together: give both files")
            self._screening(self.output).check()
            for source in (self.clean, self.harmful, self.harmless):
                if source is not None:
                    read_pairs(source)
        read_pairs(self.alignment)
        rows = read_pairs(self.train)
        if not {"trace", "repair"} & set(self.skip):
            places_by_id(rows)
            if len(rows) <= self.drop:
                raise ValueError(
                    f"--drop {self.drop}: {self.train} has {len(rows)} rows, and some must be left "
                    "to train on: lower it"
                )

    def _settings(self) -> Facts:
        """What the results depend on: the options, and the SHA-256 of each input file."""
        names = ("train", "alignment", "unsafe", "safe", "clean", "harmful", "harmless")
        files = {name: getattr(self, name) for name in names}
        known = {
            name: file_record(Path(path))["sha256"]
            for name, path in files.items()
            if path and Path(path).is_file()
        }
        options = plain(self)
        del options["batch_tokens"]  # of memory only: another one continues
        return {**options, "files": known}

    def _ask(self, model: ModelOptions, groups: Mapping[str, Sequence[Row]]) -> Facts:
        limits = self.answer_tokens, self.batch_tokens
        return ask(model, encoding_of(self.safegrad), groups, self.refusals, *limits)

    def _answered(self, found: Facts, prompts: Sequence[Row]) -> list[Facts]:
        """Unsafe prompts with the answers that are no refusals."""
        pairs = zip(prompts_of(prompts), found["answers"]["unsafe"], strict=True)
        return [
            {"prompt": prompt, "response": text}
            for prompt, text in pairs
            if text.strip() and not holds(text, self.refusals)
        ][: self.queries]

    def _screening(self, output: str, resume: bool = False) -> Screen:
        return Screen(
            rows=self.train,
            output=output,
            model=self.model,
            unsafe=self.harmful,
            safe=self.harmless,
            alignment=self.alignment,
            calibrate=self.clean,
            max_fpr=self.max_fpr,
            config=self.screen,
            batch_tokens=self.batch_tokens,
            top=0,
            resume=resume,
            progress=self.progress,
        )

    def _screen(self, folder: Path) -> Facts:
        result = self._screening(str(folder), folder.exists()).run()
        assert result is not None
        found = result.calibrations[result.decide]
        rows = len(result.columns[result.decide])
        if result.flagged == rows:
            raise ValueError(
                f"{self.train}: the screening flagged all {rows} rows, none is left to train on: "
                "give --clean rows in the style of --train, a lower --max_fpr or --skip [screen], "
                "and another --output"
            )
        return {
            "score": result.decide,
            "threshold": found.threshold,
            "rows": rows,
            "flagged": result.flagged,
            "kept": str(folder / KEPT),
        }

    def _finetuning(self, train: str, output: str, resume: bool = False) -> Finetune:
        return Finetune(
            train=train,
            alignment=self.alignment,
            output=output,
            model=self.model,
            lora=self.lora,
            safegrad=self.safegrad,
            training=self.training,
            resume=resume,
            progress=self.progress,
        )

    def _finetune(self, folder: Path, train: str) -> Facts:
        job = self._finetuning(train, *begun(folder))
        result = job.run()
        assert result is not None
        _check_trained(result)
        return {k: getattr(result, k) for k in ("steps", "skipped", "cosines", "loss", "last_loss")}

    def _trace(
        self, folder: Path, model: ModelOptions, train: str, answered: Sequence[Facts]
    ) -> Facts:
        """The rows most similar to the answers, by their mean similarity."""
        from gradsafe._jobs.trace import find_rows

        folder.mkdir(exist_ok=True)
        index = str(folder / "index")
        Build(train, index, model, self.trace, self.batch_tokens, self.progress).run()
        count = min(self.drop, len(read_pairs(train)) - 1)  # one at least is left to train on
        found = find_rows(model, index, answered, count, self.batch_tokens)
        lines = [to_line({"id": name, "score": score}) for name, score in found]
        write_text(folder / TRACED, "".join(lines))
        return {"queries": len(answered), "ids": [name for name, _ in found]}

    def _repair(self, folder: Path, tuned: ModelOptions, train: str) -> Facts:
        output, resume = begun(folder)
        job = Repair(
            rows=train,
            drop=str(folder.parent / "trace" / TRACED),
            retain=self.alignment,
            output=output,
            model=tuned,
            lora=self.lora,
            safegrad=self.safegrad,
            training=self.training,
            batch_tokens=self.batch_tokens,
            resume=resume,
            progress=self.progress,
        )
        result = job.run()
        assert result is not None
        _check_trained(result.training)
        return {
            "dropped": result.dropped, "rows": result.rows, "steps": result.training.steps,
            "NLL of dropped rows": [result.before.forgotten, result.after.forgotten],
            "NLL of alignment rows": [result.before.retained, result.after.retained],
        }  # fmt: skip

    def _say(self, text: str) -> None:
        if self.progress:
            print(f"gradsafe: {text}", file=sys.stderr, flush=True)


def _check_trained(result: FinetuneResult) -> None:
    if not result.trained:
        raise ValueError(f"{result.output}: a gradient held NaN or Inf in every step")

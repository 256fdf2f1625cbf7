"""`gradsafe finetune`: LoRA or full fine-tuning with gradient surgery."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from gradsafe._io.processes import Processes
from gradsafe._io.records import Row
from gradsafe._jobs.data import read_pairs
from gradsafe._jobs.detector import check_agreement
from gradsafe._jobs.options import FLAT, ModelOptions, plain, save_config, transient, with_line_ends
from gradsafe._jobs.training import SET_ELSEWHERE, TRAINING, checked_training
from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.models.encoding import Encoding


@dataclass(frozen=True)
class LoraOptions:
    """LoRA adapters; the defaults are the paper's.

    Attributes:
        r: Rank.
        alpha: Scale, divided by the rank.
        dropout: Dropout rate.
        targets: Names of the modules that get an adapter.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did.

    Attributes:
        output: Folder of the model or adapter.
        steps: Optimizer steps.
        skipped: Steps that were skipped because a gradient held NaN or Inf.
        cosines: Logged mean cosines of user and alignment gradient.
        loss: Name of the alignment loss.
        last_loss: Its last logged value; None if it was not logged.
        trained: Whether a step was not skipped, of those after the checkpoint if it resumed.
    """

    output: str
    steps: int
    skipped: int
    cosines: list[float]
    loss: str
    last_loss: float | None
    trained: bool


@dataclass(frozen=True)
class Finetune:
    """Fine-tune on untrusted data without losing alignment.

    The defaults are the paper's: LoRA on q_proj, k_proj and v_proj; AdamW at 1e-5, constant;
    batches of 10; 10 epochs; rho 1. Several GPUs: torchrun --nproc-per-node N -m gradsafe finetune;
    each process then takes batches of its own, and with --training.fsdp true holds a part of the
    model.

    Attributes:
        train: User data: rows with "prompt" and "response" or "completion" (text or messages), or
            "messages"; JSON Lines or hf:ID:SPLIT.
        alignment: About 100 unsafe prompts with refusals, in the same formats.
        output: Folder to write.
        model: Model.
        full: Train all weights and no adapters; needs safegrad.reference (a model folder, for
            example the start model), or safegrad.loss sft.
        lora: LoRA adapters.
        safegrad: SafeGrad.
        training: Fields of transformers.TrainingArguments, for example training.learning_rate.
        resume: Continue from the last checkpoint.
        progress: Show a progress bar.
    """

    train: str = ""
    alignment: str = ""
    output: str = ""
    model: ModelOptions = field(default_factory=ModelOptions, metadata=FLAT)
    full: bool = False
    lora: LoraOptions = field(default_factory=LoraOptions)
    safegrad: SafeGradConfig = field(default_factory=SafeGradConfig)
    training: dict[str, Any] = field(default_factory=dict)
    resume: bool = transient(False)
    progress: bool = transient(True)

    MEMORY: ClassVar = "--training.per_device_train_batch_size"

    def run(self, processes: Processes | None = None) -> FinetuneResult | None:
        """Trains and saves.

        Returns:
            The result, in the first process; None in the others.

        Raises:
            ValueError, OSError: Inputs or options do not fit; the message says what to do.
            KeyboardInterrupt: Interrupted; the last checkpoint can be resumed.
        """
        self.check()
        rows = {name: read_pairs(getattr(self, name)) for name in ("train", "alignment")}
        return self.fit(rows, processes or Processes())

    def fit(
        self,
        rows: dict[str, list[Row]],
        processes: Processes,
        job: Any = None,
        trainer_of: Callable[..., Any] | None = None,
    ) -> FinetuneResult | None:
        """Trains on rows that were read, and saves; for jobs that fine-tune in their course.

        Args:
            rows: "train" and "alignment".
            processes: The processes.
            job: The configuration to write beside the output, if not this one.
            trainer_of: Makes the trainer; None for `SafeGradTrainer`.
        """
        if processes.first:
            self.check_output(Path(self.output))
        processes.wait("the output is checked")  # before any process writes

        # Everything below needs torch and transformers, which take seconds to import.
        from gradsafe.finetuning.checkpoint import last

        trainer = self._trainer(rows, processes, plain(job or self), trainer_of)
        start = last(self.output) if self.resume else None
        if start:
            trainer.resume_point(start)  # before the configuration of that run is replaced
        if processes.first:
            save_config(job or self, self.output)
        try:
            with redirect_stdout(sys.stderr):  # the logs; the result alone goes to stdout
                trainer.train(resume_from_checkpoint=start or self.resume or None)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("--resume continues from the last checkpoint") from None
        trainer.save_model(self.output)
        result = None
        if processes.first:
            result = _result(trainer, self.output)
        accelerator = trainer.accelerator
        accelerator.wait_for_everyone()
        # The reducer of DDP must not be the last owner of the process group: it is freed while
        # holding Python's lock and waits for gloo's threads, which may wait for that lock.
        del trainer
        accelerator.free_memory()
        gc.collect()
        accelerator.end_training()  # destroys the process group
        return result

    def check(self) -> None:
        """Raises ValueError for options that are missing or exclude each other."""
        for name in ("train", "alignment", "output"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        self.model.check()
        for key, place in SET_ELSEWHERE.items():
            if key in self.training:
                raise ValueError(f"training.{key} is set by {place}: leave it out")
        if self.full and self.model.adapter:
            raise ValueError("--full trains no adapters: merge --adapter into the model first")
        if self.lora != LoraOptions() and (self.full or self.model.adapter):
            given = "--full" if self.full else "--adapter"
            raise ValueError(f"--lora is for new adapters, and {given} adds none: leave it out")
        internal = self.safegrad.reference in ("adapter_off", "cached")
        if self.full and internal and self.safegrad.loss == "kl":
            raise ValueError(
                "full needs safegrad.reference, a model folder (the start model itself), or "
                "safegrad.loss: sft"
            )

    def check_output(self, output: Path) -> None:
        """Raises ValueError or OSError if the output cannot be written or resumed."""
        if output.exists() and not output.is_dir():
            raise FileExistsError(f"{output} exists and is not a folder: choose another output")
        if not self.resume and output.exists() and any(output.iterdir()):
            raise FileExistsError(f"{output} is not empty: choose --resume or another output")
        if not output.resolve().parent.is_dir():
            raise FileNotFoundError(f"cannot write {output}: no such folder {output.parent}")
        if self.resume:
            from gradsafe.finetuning.checkpoint import last

            if last(output) is None:
                raise ValueError(
                    f"--resume: no complete checkpoint in {output}: start without --resume, in an "
                    "empty folder"
                )

    def _trainer(
        self,
        rows: dict[str, list[Row]],
        processes: Processes,
        facts: dict[str, Any],
        trainer_of: Callable[..., Any] | None,
    ) -> Any:
        from transformers import set_seed

        from gradsafe._jobs.model import load_model
        from gradsafe.finetuning.trainer import SafeGradTrainer

        training = self._training_arguments(processes)
        check_agreement(processes, [facts, rows], training.device)
        model, tokenizer = load_model(self.model, processes, trainable=True)
        safegrad = _typed(self.safegrad)
        if isinstance(safegrad.reference, str) and safegrad.reference not in (
            "adapter_off",
            "cached",
        ):
            same = safegrad.reference == self.model.model
            revision = self.model.revision if same else None
            other = replace(self.model, model=safegrad.reference, adapter=None, revision=revision)
            safegrad = replace(safegrad, reference=load_model(other, processes)[0])
        set_seed(training.seed)  # new adapters are random, and the same in all processes
        if not (self.full or self.model.adapter):
            model = self._with_lora(model)
        return (trainer_of or SafeGradTrainer)(
            model=model,
            args=training,
            train_dataset=rows["train"],
            alignment_dataset=rows["alignment"],
            processing_class=tokenizer,
            safegrad=safegrad,
        )

    def _training_arguments(self, processes: Processes) -> Any:
        from transformers import TrainingArguments

        from gradsafe._jobs.model import choose_device
        from gradsafe.finetuning.support import check_arguments

        given = checked_training(self.training)
        if given.get("fsdp") and processes.count == 1:
            raise ValueError("training.fsdp: fsdp needs several processes; start with torchrun")
        try:
            arguments = TrainingArguments(
                output_dir=self.output,
                disable_tqdm=not self.progress or not sys.stderr.isatty(),
                use_cpu=choose_device(self.model.device).type == "cpu",
                **{**TRAINING, **given},
            )
            check_arguments(arguments)
            return arguments
        except (ValueError, TypeError) as error:
            text = " ".join(str(error).split())
            named = [key for key in given if key in text]
            key = next(iter(named or [key for key in given if str(given[key]) in text]), None)
            raise ValueError(f"training{f'.{key}' if key else ''}: {text}") from error

    def _with_lora(self, model: Any) -> Any:
        try:
            from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        except ImportError as error:
            raise ImportError(
                f"LoRA needs peft ({error}): pip install 'gradsafe[finetune]', or set full"
            ) from error
        from gradsafe.models.compat import quiet_renames

        options = asdict(self.lora)
        config = LoraConfig(
            r=options["r"],
            lora_alpha=options["alpha"],
            lora_dropout=options["dropout"],
            target_modules=list(options["targets"]),
            task_type="CAUSAL_LM",
        )
        try:
            with quiet_renames():
                if self.model.quantization:
                    model = prepare_model_for_kbit_training(model, False)
                return get_peft_model(model, config)
        except ValueError as error:
            raise ValueError(f"lora.targets: {' '.join(str(error).split())}") from error


def encoding_of(safegrad: SafeGradConfig) -> Encoding:
    """How a fine-tuning with these options encodes rows."""
    return _typed(safegrad).encoding


def _typed(safegrad: SafeGradConfig) -> SafeGradConfig:
    return SafeGradConfig(**with_line_ends(vars(safegrad)))


def _result(trainer: Any, output: str) -> FinetuneResult:
    logs = [entry for entry in trainer.state.log_history if "safegrad/cosine" in entry]
    return FinetuneResult(
        output=output,
        steps=trainer.state.global_step,
        skipped=trainer.skipped_steps,
        cosines=[entry["safegrad/cosine"] for entry in logs],
        loss="KL" if trainer.safegrad.loss == "kl" else "alignment loss",
        last_loss=logs[-1].get("safegrad/kl") if logs else None,
        trained=trainer.trained,
    )

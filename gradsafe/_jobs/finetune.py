"""`gradsafe finetune`: LoRA or full fine-tuning with gradient surgery."""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from gradsafe._io.processes import Processes
from gradsafe._io.records import Row
from gradsafe._jobs.data import read_pairs
from gradsafe._jobs.detector import check_agreement
from gradsafe._jobs.options import FLAT, ModelOptions, plain, save_config, transient, with_line_ends
from gradsafe.finetuning.config import SafeGradConfig

TRAINING = {
    "per_device_train_batch_size": 10,
    "learning_rate": 1e-5,
    "num_train_epochs": 10.0,
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}
SET_ELSEWHERE = {
    "output_dir": "--output",
    "resume_from_checkpoint": "--resume",
    "disable_tqdm": "--progress false",
    "use_cpu": "--device",
}


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
        processes = processes or Processes()
        self._check()
        rows = {name: read_pairs(getattr(self, name)) for name in ("train", "alignment")}
        if processes.first:
            self._check_output(Path(self.output))
        processes.wait("the output is checked")  # before any process writes

        # Everything below needs torch and transformers, which take seconds to import.
        from gradsafe.finetuning.checkpoint import last

        trainer = self._trainer(rows, processes)
        start = last(self.output) if self.resume else None
        if start:
            trainer.resume_point(start)  # before the configuration of that run is replaced
        if processes.first:
            save_config(self, self.output)
        try:
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

    def _check(self) -> None:
        for name in ("train", "alignment", "output"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        self.model.check()
        for key, place in SET_ELSEWHERE.items():
            if key in self.training:
                raise ValueError(f"training.{key} is set by {place}: leave it out")
        internal = self.safegrad.reference in ("adapter_off", "cached")
        if self.full and internal and self.safegrad.loss == "kl":
            raise ValueError(
                "full needs safegrad.reference, a model folder (the start model itself), or "
                "safegrad.loss: sft"
            )

    def _check_output(self, output: Path) -> None:
        if output.exists() and not output.is_dir():
            raise FileExistsError(f"{output} exists and is not a folder: choose another output")
        if not self.resume and output.exists() and any(output.iterdir()):
            raise FileExistsError(f"{output} is not empty: choose --resume or another output")
        if not output.resolve().parent.is_dir():
            raise FileNotFoundError(f"cannot write {output}: no such folder {output.parent}")
        if self.resume:
            from gradsafe.finetuning.checkpoint import last

            if last(output) is None:
                raise ValueError(f"--resume: no checkpoint in {output}")

    def _trainer(self, rows: dict[str, list[Row]], processes: Processes) -> Any:
        from transformers import set_seed

        from gradsafe._jobs.model import load_model
        from gradsafe.finetuning.trainer import SafeGradTrainer

        training = self._training_arguments(processes)
        check_agreement(processes, [plain(self), rows], training.device)
        model, tokenizer = load_model(self.model, processes, trainable=True)
        safegrad = SafeGradConfig(**with_line_ends(vars(self.safegrad)))
        if isinstance(safegrad.reference, str) and safegrad.reference not in (
            "adapter_off",
            "cached",
        ):
            other = replace(self.model, model=safegrad.reference, adapter=None, revision=None)
            safegrad = replace(safegrad, reference=load_model(other, processes)[0])
        set_seed(training.seed)  # new adapters are random, and the same in all processes
        if not (self.full or self.model.adapter):
            model = self._with_lora(model)
        return SafeGradTrainer(
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

        given = _checked_training(self.training)
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


def _checked_training(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of TrainingArguments under their present names, with checked types."""
    import difflib

    from jsonargparse import ArgumentParser
    from transformers import TrainingArguments

    from gradsafe.models.compat import training_option

    known = {item.name for item in fields(TrainingArguments) if item.init}
    types = ArgumentParser(exit_on_error=False)
    # The annotation of fsdp does not name everything that it accepts.
    types.add_class_arguments(TrainingArguments, fail_untyped=False, skip={"output_dir", "fsdp"})
    given: dict[str, Any] = {}
    for key, value in values.items():
        name = training_option(key, known)
        if name not in known:
            near = difflib.get_close_matches(key, known - set(SET_ELSEWHERE), n=1, cutoff=0.0)
            raise ValueError(f"training.{key}: unknown key, did you mean {near[0]}?")
        if name in given:
            raise ValueError(f"training.{key} is the same as {name}: leave one of them out")
        if name != "fsdp":
            try:
                value = types.parse_object({name: value})[name]
            except Exception as error:  # of several kinds, by the version of jsonargparse
                reason = " ".join(str(error).split()).partition(": ")[2]
                raise ValueError(f"training.{key}: {reason or error}") from error
        given[name] = value
    return given


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

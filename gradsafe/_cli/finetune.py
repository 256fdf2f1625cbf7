"""`gradsafe finetune`: LoRA or full fine-tuning under gradient surgery, from one YAML file."""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_type_hints

from gradsafe._cli.finetune_config import (
    LORA_DEFAULTS,
    TRAINING_DEFAULTS,
    Settings,
    read_settings,
)
from gradsafe._cli.options import TESTBED
from gradsafe._cli.processes import check_agreement
from gradsafe._io.processes import Processes
from gradsafe._io.records import Row, read_jsonl

EXAMPLE = """the file, with all keys that have no default:

  model: path/to/chat-model      # or testbed
  train: user.jsonl              # lines with prompt and response
  alignment: refusals.jsonl      # about 100 unsafe prompts with refusals, likewise
  output: tuned

and those that may be given: dtype, device, lora (r, alpha, dropout, targets; or false for all
weights), safegrad (fields of gradsafe.SafeGradConfig; reference may be a model folder), training
(fields of transformers.TrainingArguments). lora: false needs reference: a model folder (the start
model itself), or loss: sft. Defaults are the paper's: LoRA r 8, alpha 16, dropout 0.1 on q_proj,
k_proj and v_proj; AdamW at 1e-5, constant; batches of 10; 10 epochs; rho 1.

several GPUs: torchrun --nproc-per-node N -m gradsafe finetune ...; each process then takes
batches of its own, and with fsdp: true in training holds a piece of the model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.set_defaults(memory_option="per_device_train_batch_size in the section training")
    parser.add_argument("--config", required=True, metavar="FILE", help="settings in YAML")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises what `cli.main` turns into one line."""
    settings = read_settings(args.config)
    rows = {name: _rows(getattr(settings, name)) for name in ("train", "alignment")}
    processes: Processes = args.processes
    if processes.first:
        _check_output(args, Path(settings.output))
    processes.wait("the output is checked")  # nobody writes before

    # From here on torch and transformers are needed, which takes seconds to import.
    from gradsafe.finetuning.checkpoint import last

    safegrad = _safegrad(settings)
    trainer = _trainer(args, settings, rows, safegrad)
    start = last(settings.output) if args.resume else None
    try:
        trainer.train(resume_from_checkpoint=start or args.resume or None)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("--resume goes on from the last checkpoint") from None
    trainer.save_model(settings.output)
    if processes.first:
        _warn_if_untrained(trainer, start)
        print(_summary(trainer, settings.output))
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    # DDP's reducer must not be the last owner of the process group: it is freed under the
    # interpreter's lock, and then waits for the threads of gloo, which may wait for that lock.
    del trainer
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()  # which ends the process group
    return 0


def _check_output(args: argparse.Namespace, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} exists and is no folder: choose another output")
    if not args.resume and output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty: choose --resume or another output")
    if not output.resolve().parent.is_dir():
        raise FileNotFoundError(f"cannot write {output}: no such folder {output.parent}")
    if args.resume:
        from gradsafe.finetuning.checkpoint import last

        if last(output) is None:
            raise ValueError(f"--resume: no checkpoint in {output}")


def _rows(path: str) -> list[Row]:
    rows = read_jsonl(path, required=("prompt", "response"))
    if not rows:
        raise ValueError(f"{path}: no rows in this file")
    return rows


def _safegrad(settings: Settings) -> dict[str, Any]:
    """The fields of the section, checked."""
    from gradsafe.finetuning import SafeGradConfig

    section = settings.safegrad
    hints = {**get_type_hints(SafeGradConfig), "reference": str}
    section.check_keys(hints)
    section.check_types(hints)
    values = dict(section.values)
    known = values if values.get("reference") in ("adapter_off", "cached") else {
        key: value for key, value in values.items() if key != "reference"
    }  # fmt: skip
    try:
        SafeGradConfig(**known)
    except ValueError as error:
        raise section.blame(error) from error
    return values


def _trainer(
    args: argparse.Namespace, settings: Settings, rows: dict[str, list[Row]], safegrad: Any
) -> Any:
    from transformers import set_seed

    from gradsafe._cli.model import load_model
    from gradsafe.finetuning import SafeGradConfig
    from gradsafe.finetuning.trainer import SafeGradTrainer

    training = _training_arguments(args, settings)
    processes: Processes = args.processes
    files = {"settings": Path(args.config).read_text(encoding="utf-8"), **rows}
    check_agreement(processes, [files], training.device)
    number = processes.local_rank if processes.count > 1 else None
    load = settings.dtype, settings.device, processes.first and not args.no_progress, number
    reference = safegrad.get("reference", "adapter_off")
    testbed = TESTBED in (settings.model, reference)  # trained by the first who needs it
    with processes.first_of_machine_first("testbed") if testbed else nullcontext():
        model, tokenizer = load_model(settings.model, *load, ("model:", "device:"))
        if reference not in ("adapter_off", "cached"):
            second, _ = load_model(reference, *load, ("safegrad: reference:", "device:"))
            safegrad = {**safegrad, "reference": second}
    set_seed(training.seed)  # new adapters are random, and the same in all processes
    if settings.lora is not None:
        model = _with_lora(model, {**LORA_DEFAULTS, **settings.lora.values}, settings)
    return SafeGradTrainer(
        model=model,
        args=training,
        train_dataset=rows["train"],
        alignment_dataset=rows["alignment"],
        processing_class=tokenizer,
        safegrad=SafeGradConfig(**safegrad),
    )


def _training_arguments(args: argparse.Namespace, settings: Settings) -> Any:
    from dataclasses import fields

    from transformers import TrainingArguments

    from gradsafe._cli.model import choose_device
    from gradsafe.models.compat import training_option

    known = {item.name for item in fields(TrainingArguments) if item.init}
    section = settings.training.renamed(lambda key: training_option(key, known))
    section.check_keys(known)
    section.check_types({**get_type_hints(TrainingArguments), "fsdp": bool | str | None})
    values = {**TRAINING_DEFAULTS, **section.values}
    if values.get("fsdp") and args.processes.count == 1:
        raise section.error("fsdp shards over several processes; start with torchrun", "fsdp")
    try:
        return TrainingArguments(
            output_dir=settings.output,
            disable_tqdm=args.no_progress or not sys.stderr.isatty(),
            use_cpu=choose_device(settings.device, option="device:").type == "cpu",
            **values,
        )
    except (ValueError, TypeError) as error:
        raise section.blame(error) from error


def _with_lora(model: Any, options: dict[str, Any], settings: Settings) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            f"LoRA needs peft ({error}): pip install 'gradsafe[finetune]', or set lora: false"
        ) from error
    from gradsafe.models.compat import quiet_renames

    assert settings.lora is not None
    try:
        with quiet_renames():
            return get_peft_model(
                model,
                LoraConfig(
                    r=options["r"],
                    lora_alpha=options["alpha"],
                    lora_dropout=options["dropout"],
                    target_modules=list(options["targets"]),
                    task_type="CAUSAL_LM",
                ),
            )
    except ValueError as error:
        raise settings.lora.blame(error) from error


def _warn_if_untrained(trainer: Any, start: str | None) -> None:
    steps = trainer.state.global_step - (0 if start is None else int(start.rpartition("-")[2]))
    if steps and trainer.skipped_steps == steps:
        warnings.warn(
            f"all {steps} steps were skipped, since a gradient held NaN or Inf: the model that was "
            "written is the one that training started from",
            stacklevel=2,
        )


def _summary(trainer: Any, output: str) -> str:
    logs = [entry for entry in trainer.state.log_history if "safegrad/cosine" in entry]
    parts = [f"{trainer.state.global_step} steps"]
    if logs:
        cosine = [entry["safegrad/cosine"] for entry in logs]
        parts.append(f"mean logged cosine {sum(cosine) / len(cosine):+.3f}")
        last = f"last {cosine[-1]:+.3f}"
        if "safegrad/kl" in logs[-1]:
            name = "KL" if trainer.safegrad.loss == "kl" else "alignment loss"
            last += f", {name} {logs[-1]['safegrad/kl']:.4f}"
        parts.append(last)
    parts.append(f"{trainer.skipped_steps} skipped")
    return f"{', '.join(parts)}; written to {output}"

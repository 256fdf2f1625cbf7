"""SafeGrad's training step for any trainer derived from the one of transformers."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from gradsafe._checks import refuse
from gradsafe._io.fingerprints import model_fingerprint
from gradsafe.finetuning import checkpoint
from gradsafe.finetuning.alignment import KLAlignment, SFTAlignment
from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.finetuning.facts import argument_facts, given_facts, option_facts, parameter_facts
from gradsafe.finetuning.rows import (
    AlignmentOrder,
    Row,
    checked_fingerprint,
    encode_rows,
    fingerprint,
    response_tokens,
    row_collator,
)
from gradsafe.finetuning.support import check_alignment, check_arguments, check_supported
from gradsafe.finetuning.surgery import GradientSurgery
from gradsafe.finetuning.teachers import in_adapters, refuse_shared

AlignmentLoss = Callable[..., Tensor]


class SafeGradMixin(Trainer):
    """Adds gradient surgery to a trainer derived from `transformers.Trainer`.

    `class Mine(SafeGradMixin, SomeTrainer)` protects `SomeTrainer`, provided that it keeps the
    `training_step` of transformers and leaves the gradients in `.grad`. The user loss is the loss
    of `SomeTrainer`. For the steps and the arguments see `SafeGradTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        alignment_dataset: Any = None,
        safegrad: SafeGradConfig | None = None,
        alignment_loss: AlignmentLoss | None = None,
        **options: Any,
    ) -> None:
        check_alignment(alignment_dataset, safegrad)
        arguments = options.get("args", args[1] if len(args) > 1 else None)
        if arguments is not None:
            check_arguments(arguments)  # before transformers divides by them
        super().__init__(*args, **options)
        self.safegrad = safegrad or SafeGradConfig()
        check_supported(self)
        self._given = given_facts(self)
        self._parameters: dict[str, Any] = {}
        self._skipped_before = 0  # in the run before the checkpoint that it resumed from
        self._train_rows: str | None = None
        self._collate = row_collator(self.processing_class, self.model)
        self._alignment_rows = self._encode("alignment_dataset", alignment_dataset)
        _ = self.alignment_batch_size  # raises if the processes cannot share it
        seed = self.safegrad.alignment_seed
        if seed is None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._order = AlignmentOrder(len(self._alignment_rows), seed)
        self._surgery: GradientSurgery | None = None
        self._reference_weights: str | None = None
        self._frozen_weights = self._of_first_process(self._frozen)
        self._alignment_loss = alignment_loss or self._configured_loss(self.model)
        self._reset_window()
        self._watched = (0, 0.0)  # steps and sum of the cosine for the warning

    @property
    def alignment_batch_size(self) -> int:
        """Number of alignment rows per optimizer step, summed over all processes."""
        processes = self.accelerator.num_processes
        size = self.safegrad.alignment_batch_size
        if size is None:
            size = self._train_batch_size * self.args.gradient_accumulation_steps * processes
        if size % processes:
            expected = f"alignment_batch_size to be a multiple of {processes} processes"
            refuse("SafeGradTrainer", expected, size)
        return size

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps of the run; synchronises with the device."""
        return self._skipped_before + (0 if self._surgery is None else self._surgery.skipped)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Trains as `transformers.Trainer.train` does; also resumes the order of alignment rows.

        `resume_from_checkpoint=True` selects the newest complete checkpoint and ignores those whose
        saving was interrupted. Only `max_steps` and `num_train_epochs` may change, to a larger
        number; a schedule of the learning rate that depends on the number of steps changes then.
        Of a checkpoint that has every step already, the weights are loaded and no step is taken.

        Raises:
            ValueError: There is no checkpoint, `SafeGradTrainer` did not write it, it belongs to a
                run with other rows, options or trainable parameters, or it has every step of
                `max_steps` already, with FSDP; a token id or label of a row is out of range; or a
                new run took no optimizer step.
        """
        folder, start, progress = self.resume_point(resume_from_checkpoint)
        self._order.drawn, self._skipped_before = progress
        self._surgery = None
        self._reset_window()
        if folder and 0 < self.args.max_steps <= start:  # transformers would take one step more
            result: Any = self._load_complete(folder)
        else:
            result = super().train(folder, *args, **options)
        if self.state.global_step == 0:
            expected = "training to take at least one optimizer step"
            do = "check num_train_epochs, dataloader_drop_last, callbacks and train_dataset"
            refuse("SafeGradTrainer", expected, "none", do)
        if not self.trained:
            steps = self.state.global_step
            warnings.warn(
                f"gradsafe.SafeGradTrainer: all {steps} steps were skipped because a "
                "gradient held NaN or Inf: the model is the one that training started from",
                stacklevel=2,
            )
        return result

    @property
    def trained(self) -> bool:
        """Whether a step of the run was not skipped."""
        return self.skipped_steps < self.state.global_step

    def resume_point(
        self, resume_from_checkpoint: Any
    ) -> tuple[str | None, int, checkpoint.Progress]:
        """Checks the user rows, and a checkpoint; `train` calls it with its argument.

        Returns:
            The folder of the checkpoint (None for a new run), and the optimizer steps and the
            progress before it.

        Raises:
            ValueError: As `train`, before the first step.
        """
        rows, model = self.train_dataset, self.model
        self._train_rows = checked_fingerprint("train_dataset", rows, model, self._alignment_rows)
        self._parameters = parameter_facts(model)  # now, since the model will be wrapped
        folder = resume_from_checkpoint
        if folder is True:
            assert self.args.output_dir is not None  # transformers has a default
            folder = checkpoint.last(self.args.output_dir)
            if folder is None:
                raise ValueError(
                    f"gradsafe.SafeGradTrainer: no complete checkpoint in {self.args.output_dir}"
                )
        if not folder:
            return None, 0, checkpoint.Progress()
        return folder, checkpoint.step(folder), checkpoint.read(folder, self._identity())

    def _load_complete(self, folder: str) -> TrainOutput:
        """Loads weights and state of a checkpoint that has every step."""
        if self.is_fsdp_enabled:
            refuse(
                "SafeGradTrainer",
                f"max_steps above those of {folder}",
                self.args.max_steps,
                "raise it, or use the weights of the checkpoint",
            )
        self._load_from_checkpoint(folder)
        self.state = TrainerState.load_from_json(str(Path(folder, TRAINER_STATE_NAME)))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(self.state.global_step, 0.0, {})

    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        """Runs one micro-batch of user data; after the last one of a step, protects the step."""
        loss = super().training_step(model, *args, **options)
        if self.accelerator.sync_gradients:
            self._protect(model)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Adds the statistics of the surgery to the training logs."""
        if self._surgery is not None and "loss" in logs:
            logs.update(self._read_window(self._surgery))
        super().log(logs, *args, **options)

    def _protect(self, model: nn.Module) -> None:
        """Stashes the user gradient, computes the alignment gradient, and merges both."""
        if self._surgery is None:
            self._surgery = self._new_surgery(model)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        drawn = [self._alignment_rows[i] for i in self._order.draw(self.alignment_batch_size)]
        # Processes average their gradients: this gives the mean over all response tokens.
        normalizer = sum(map(response_tokens, drawn)) / processes
        columns = 0
        if self.safegrad.kl_tokens == "all":  # padding must not depend on the number of processes
            columns = max(len(row["input_ids"]) for row in drawn)
        own, size = drawn[rank::processes], self._train_batch_size
        starts = range(0, len(own), size)
        # The compiled module would not run the hooks of the alignment loss.
        runs = getattr(model, "_orig_mod", model)
        self._surgery.stash()
        value = torch.zeros((), device=self.args.device, dtype=torch.float32)
        for start in starts:
            batch = self._prepare_inputs(self._collate(own[start : start + size], columns))
            last = start == starts[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.accelerator.autocast():
                    loss = self._alignment_loss(batch, runs, normalizer=normalizer)
                self.accelerator.backward(loss)
            value += loss.detach().to(value)
        self._surgery.merge()
        finite = value.isfinite()
        self._window += torch.stack([finite.to(value), torch.where(finite, value, 0.0)])

    def _new_surgery(self, model: nn.Module) -> GradientSurgery:
        assert self.optimizer is not None
        stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
        known, names = set(map(id, stepped)), {}
        for name, parameter in model.named_parameters():
            names[id(parameter)] = name
            if parameter.requires_grad and id(parameter) not in known:
                raise ValueError(
                    f"gradsafe.SafeGradTrainer: {name} requires a gradient, but the optimizer does "
                    "not update it; call requires_grad_(False) on it"
                )
        scaled = getattr(self.accelerator, "scaler", None) is not None
        return GradientSurgery(
            [(names.get(id(p)), p) for p in stepped],
            self.safegrad.rho,
            self.safegrad.scope,
            projection=self.safegrad.projection,
            on_nonfinite="poison" if scaled else "drop",
        )

    def _encode(self, name: str, rows: Any) -> list[Row]:
        tokenizer: Any = self.processing_class
        hidden = self.args.disable_tqdm
        return encode_rows(name, rows, tokenizer, self.safegrad, self.model, progress=not hidden)

    def _configured_loss(self, model: Any) -> AlignmentLoss:
        options = self.safegrad
        if options.loss == "sft":
            return SFTAlignment(model)
        reference: Any = options.reference
        if isinstance(reference, nn.Module):
            refuse_shared(reference, model)
            self._reference_weights = self._of_first_process(lambda: model_fingerprint(reference))
            reference.requires_grad_(False)
            if self.is_fsdp_enabled:  # accelerate prepares only one model
                reference.to(self.args.device)
            else:
                reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        loss = KLAlignment(model, reference, options.kl_tokens)
        if reference == "adapter_off":
            self._reference_weights = self._of_first_process(
                lambda: model_fingerprint(model, in_adapters(model))
            )
        if reference == "cached":
            # The reference is the model as it is now; train() loads a checkpoint later.
            self._reference_weights = self._of_first_process(lambda: model_fingerprint(model))
            rows, size = self._alignment_rows, self._train_batch_size
            batches = (self._collate(rows[i : i + size]) for i in range(0, len(rows), size))
            with self.accelerator.autocast():
                loss.cache(map(self._prepare_inputs, batches))
        return loss

    def _identity(self) -> dict[str, Any]:
        """Return what must not change when a run resumes."""
        rows = self._train_batch_size * self.args.gradient_accumulation_steps
        return {
            **option_facts(self.safegrad),
            "alignment_seed": self._order.seed,
            "alignment_rows": fingerprint(self._alignment_rows),
            "train_rows": self._train_rows,
            "batch_size": rows * self.accelerator.num_processes,
            **argument_facts(self.args),
            **self._given,
            **self._parameters,
            "reference_weights": self._reference_weights,
            "frozen_weights": self._frozen_weights,
        }

    def _frozen(self) -> str:
        model: Any = self.model
        return model_fingerprint(model, {id(p) for p in model.parameters() if p.requires_grad})

    def _of_first_process(self, fingerprint: Callable[[], str]) -> str:
        """The other processes may not have loaded the weights (`cpu_ram_efficient_loading`)."""
        shared = [fingerprint() if self.accelerator.is_main_process else None]
        (value,) = broadcast_object_list(shared)
        return value

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        if self.args.should_save:  # first: the trainer state makes a checkpoint complete
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            trial = options.get("trial", args[1] if len(args) > 1 else None)
            folder = Path(self._get_output_dir(trial=trial)) / name
            progress = checkpoint.Progress(self._order.drawn, self.skipped_steps)
            checkpoint.write(folder, self._identity(), progress)
        super()._save_checkpoint(*args, **options)

    def _reset_window(self) -> None:
        # Of the alignment losses: count and sum.
        self._window = torch.zeros(2, device=self.args.device, dtype=torch.float32)

    def _read_window(self, surgery: GradientSurgery) -> dict[str, float]:
        statistics = surgery.statistics()
        surgery.reset_statistics()
        count, total = self.accelerator.gather(self._window[None]).mean(0).tolist()
        self._reset_window()
        self._warn_of_no_relation(statistics.steps, statistics.cosine)
        means = ("cosine", "conflict_rate", "user_norm", "align_norm")
        values = {name: getattr(statistics, name) for name in means}
        values["kl"] = total / count if count else math.nan
        values["skipped_steps"] = float(self.skipped_steps)
        return {f"safegrad/{name}": v for name, v in values.items() if not math.isnan(v)}

    def _warn_of_no_relation(self, steps: int, cosine: float) -> None:
        count = self._watched[0] + steps
        total = self._watched[1] + (cosine * steps if steps else 0.0)
        full = count >= self.safegrad.warn_steps
        self._watched = (0, 0.0) if full else (count, total)
        if full and abs(total / count) < self.safegrad.warn_cosine:
            warnings.warn(
                f"gradsafe.SafeGradTrainer: the mean cosine of user and alignment gradient was "
                f"{total / count:+.4f} over {count} steps. Either the user data does not conflict "
                "with the alignment rows, or those rows do not resemble the harmful data and give "
                "no protection; choose similar rows",
                stacklevel=2,
            )

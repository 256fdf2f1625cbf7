"""What makes a trainer of transformers, or one built on it, take SafeGrad's steps."""

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
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradsafe._io.fingerprints import model_fingerprint
from gradsafe.finetuning import checkpoint
from gradsafe.finetuning.alignment import KLAlignment, SFTAlignment
from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.finetuning.order import AlignmentOrder
from gradsafe.finetuning.rows import RowCollator, encode_rows, response_tokens
from gradsafe.finetuning.support import check_alignment, check_supported
from gradsafe.finetuning.surgery import GradientSurgery
from gradsafe.finetuning.teachers import refuse_shared, without_adapters
from gradsafe.models import context_length, pad_token_id

AlignmentLoss = Callable[..., Tensor]


class SafeGradMixin(Trainer):
    """The steps of SafeGrad for any trainer that goes on from the one of transformers.

    `class Mine(SafeGradMixin, SomeTrainer)` protects `SomeTrainer`, provided that it leaves
    `training_step` and the gradients where transformers has them; `SafeGradTrainer` says what a
    step is. Its loss is the user loss, whatever it is.

    Args:
        alignment_dataset: As of `SafeGradTrainer`.
        safegrad: As of `SafeGradTrainer`.
        alignment_loss: As of `SafeGradTrainer`.
        *args: Of the trainer.
        **options: Of the trainer.

    Raises:
        TypeError, ValueError: As of `SafeGradTrainer`.
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
        super().__init__(*args, **options)
        self.safegrad = safegrad or SafeGradConfig()
        check_supported(self)
        model: Any = self.model
        tokenizer: Any = self.processing_class
        self._alignment_collator = RowCollator(0 if tokenizer is None else pad_token_id(tokenizer))
        self._alignment_rows = encode_rows(
            "alignment_dataset",
            alignment_dataset,
            **encoding(self.safegrad, model, tokenizer, not self.args.disable_tqdm),
        )
        _ = self.alignment_batch_size  # which must fit the processes
        seed = self.safegrad.alignment_seed
        if seed is None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._order = AlignmentOrder(len(self._alignment_rows), seed)
        self._surgery: GradientSurgery | None = None
        self._reference_weights: str | None = None
        self._alignment_loss = alignment_loss or self._configured_loss(model)
        self._reset_window()
        self._watched = (0, 0.0)

    @property
    def alignment_batch_size(self) -> int:
        """Alignment rows per optimizer step, over all processes."""
        size = self.safegrad.alignment_batch_size
        if size is None:
            micro = self._train_batch_size * self.args.gradient_accumulation_steps
            size = micro * self.accelerator.num_processes
        if size % self.accelerator.num_processes:
            raise ValueError(
                f"gradsafe.SafeGradTrainer: expected alignment_batch_size to be a multiple of "
                f"{self.accelerator.num_processes} processes, got {size}"
            )
        return size

    @property
    def skipped_steps(self) -> int:
        """Steps since `train` was called that changed nothing; waits for the device."""
        return 0 if self._surgery is None else self._surgery.skipped

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """As of `transformers.Trainer`; the order of the alignment rows is resumed, too.

        With `resume_from_checkpoint=True` a checkpoint is passed over if saving it did not end.

        Raises:
            ValueError: There is no checkpoint, it is not one of `SafeGradTrainer`, or it was
                written with other alignment rows or options.
        """
        folder = resume_from_checkpoint
        if folder is True:
            assert self.args.output_dir is not None  # transformers fills it in
            folder = checkpoint.last(self.args.output_dir)
            if folder is None:
                raise ValueError(
                    f"gradsafe.SafeGradTrainer: no whole checkpoint in {self.args.output_dir}"
                )
        self._order.drawn = checkpoint.read(folder, self._identity()) if folder else 0
        self._surgery = None
        self._reset_window()
        return super().train(folder, *args, **options)

    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        """One micro-batch of user data; after the last of a step, the alignment and the merge."""
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
        """Stashes the user gradient, computes that of the alignment rows, and merges both."""
        if self._surgery is None:
            self._surgery = self._new_surgery(model)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        drawn = [self._alignment_rows[i] for i in self._order.draw(self.alignment_batch_size)]
        # The mean over the response tokens of all processes: they average their gradients.
        normalizer = sum(map(response_tokens, drawn)) / processes
        columns = 0
        if self.safegrad.kl_tokens == "all":  # padding counts, so it must not depend on the split
            columns = max(len(row["input_ids"]) for row in drawn)
        own = drawn[rank::processes]
        starts = range(0, len(own), self._train_batch_size)
        # The compiled module would not see the hooks of the alignment loss.
        runs = getattr(model, "_orig_mod", model)
        self._surgery.stash()
        value = torch.zeros((), device=self.args.device)
        for start in starts:
            batch = self._alignment_collator(own[start : start + self._train_batch_size], columns)
            last = start == starts[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.accelerator.autocast():
                    loss = self._alignment_loss(
                        self._prepare_inputs(batch), runs, normalizer=normalizer
                    )
                self.accelerator.backward(loss)
            value += loss.detach().to(value)
        self._surgery.merge()
        finite = value.isfinite()
        self._window += torch.stack([finite.to(value), torch.where(finite, value, 0.0)])

    def _new_surgery(self, model: nn.Module) -> GradientSurgery:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert self.optimizer is not None
        stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
        stray = set(names) - {id(p) for p in stepped}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) in stray:
                raise ValueError(
                    f"gradsafe.SafeGradTrainer: {name} requires a gradient, but the optimizer does "
                    "not step it; call requires_grad_(False) on it"
                )
        scaled = getattr(self.accelerator, "scaler", None) is not None
        return GradientSurgery(
            [(names[id(p)], p) if id(p) in names else p for p in stepped],
            self.safegrad.rho,
            self.safegrad.scope,
            projection=self.safegrad.projection,
            on_nonfinite="poison" if scaled else "drop",
        )

    def _configured_loss(self, model: nn.Module) -> AlignmentLoss:
        options = self.safegrad
        if options.loss == "sft":
            return SFTAlignment(model)
        reference: Any = options.reference
        if isinstance(reference, nn.Module):
            refuse_shared(reference, model)
            self._reference_weights = self._of_first_process(lambda: model_fingerprint(reference))
            reference.requires_grad_(False)
            if self.is_fsdp_enabled:  # accelerate prepares one model only
                reference.to(self.args.device)
            else:
                reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        loss = KLAlignment(model, reference, options.kl_tokens)
        if reference == "adapter_off":
            self._reference_weights = self._of_first_process(lambda: without_adapters(model))
        if reference == "cached":
            # Now the model is the one to stay close to; a checkpoint is loaded later, by train().
            self._reference_weights = self._of_first_process(lambda: model_fingerprint(model))
            size = self._train_batch_size
            rows = self._alignment_rows
            with self.accelerator.autocast():
                loss.cache(
                    self._prepare_inputs(self._alignment_collator(rows[i : i + size]))
                    for i in range(0, len(rows), size)
                )
        return loss

    def _identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        seed = self._order.seed
        return checkpoint.identity(
            self.safegrad, self._alignment_rows, seed, self._reference_weights
        )

    def _of_first_process(self, fingerprint: Callable[[], str]) -> str:
        """The others may hold no weights yet (`cpu_ram_efficient_loading`)."""
        shared = [fingerprint() if self.accelerator.is_main_process else None]
        (value,) = broadcast_object_list(shared)
        return value

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        if self.args.should_save:  # first: a checkpoint counts once its trainer state is written
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            trial = options.get("trial", args[1] if len(args) > 1 else None)
            folder = Path(self._get_output_dir(trial=trial)) / name
            checkpoint.write(folder, self._identity(), self._order.drawn)
        super()._save_checkpoint(*args, **options)

    def _reset_window(self) -> None:
        self._window = torch.zeros(2, device=self.args.device)  # alignment losses: count and sum

    def _read_window(self, surgery: GradientSurgery) -> dict[str, float]:
        statistics = surgery.statistics()
        surgery.reset_statistics()
        count, total = self.accelerator.gather(self._window[None]).mean(0).tolist()
        self._reset_window()
        self._warn_of_silence(statistics.steps, statistics.cosine)
        values = {
            "cosine": statistics.cosine,
            "conflict_rate": statistics.conflict_rate,
            "user_norm": statistics.user_norm,
            "align_norm": statistics.align_norm,
            "kl": total / count if count else math.nan,
            "skipped_steps": float(surgery.skipped),
        }
        return {f"safegrad/{name}": v for name, v in values.items() if not math.isnan(v)}

    def _warn_of_silence(self, steps: int, cosine: float) -> None:
        """Warns when user and alignment gradients have had nothing to do with each other."""
        count = self._watched[0] + steps
        total = self._watched[1] + (cosine * steps if steps else 0.0)
        self._watched = (count, total)
        if count < self.safegrad.warn_steps:
            return
        self._watched = (0, 0.0)
        if abs(total / count) < self.safegrad.warn_cosine:
            warnings.warn(
                f"gradsafe.SafeGradTrainer: the mean cosine of user and alignment gradient was "
                f"{total / count:+.4f} over {count} steps. Either the user data holds nothing "
                "that the alignment rows speak against, or they are in another style than the "
                "harm in it, and then they protect nothing: choose alignment rows like it",
                stacklevel=2,
            )


def encoding(
    options: SafeGradConfig, model: nn.Module, tokenizer: Any, progress: bool
) -> dict[str, Any]:
    """Options of `encode_rows` for rows of text."""
    limit = options.max_length
    if limit is None and tokenizer is not None:
        limit = context_length(model, tokenizer)
    return {
        "tokenizer": tokenizer,
        "template": options.template,
        "system": options.system,
        "append_eos": options.append_eos,
        "max_length": limit,
        "progress": progress,
    }

"""SafeGrad on top of the trainer of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.finetuning.protection import AlignmentLoss, SafeGradMixin
from gradsafe.finetuning.rows import has_text, row_collator


class SafeGradTrainer(SafeGradMixin):
    """A `transformers.Trainer` that protects every step by gradient surgery (SafeGrad).

    Once per optimizer step, after the last micro-batch of user data and the reduction over
    processes, the trainer stashes the accumulated user gradient, computes the gradient of the
    alignment loss on the next alignment rows (in micro-batches of the user batch's size, reduced in
    the same way), and merges both. Clipping and the optimizer see the merged gradient. Alignment
    rows are drawn in seeded epochs; each process takes its share of every draw, so the result does
    not depend on the number of processes.

    Logged beside the loss, as means since the last log: `safegrad/cosine`,
    `safegrad/conflict_rate`, `safegrad/user_norm`, `safegrad/align_norm` and `safegrad/kl` (the
    alignment loss), and `safegrad/skipped_steps` of the run. A negative cosine
    indicates poisoned user data; the conflict rate alone does not (about 0.5 on benign data). Under
    fp16 the norms are those of scaled gradients.

    A step with a non-finite gradient changes nothing and is counted as skipped. To detect it, the
    host synchronises with the device once per optimizer step (under fp16 the loss scaler decides).

    Needs one process per device, with the whole model (DDP) or a shard of it (FSDP2, with
    `fsdp=True`; a second model as reference is not sharded). Not supported: DeepSpeed, FSDP1,
    models sharded while they are loaded (`DistributedConfig`), `nn.DataParallel`, optimizers that
    step inside the backward pass (lomo, layerwise), `ddp_static_graph`. With `torch_compile=True`
    (not with FSDP2) the alignment pass runs uncompiled.

    Args:
        model: A causal language model, with or without PEFT adapters.
        args: `transformers.TrainingArguments`.
        alignment_dataset: Rows that show the behaviour to keep and resemble the expected harm:
            about 100 unsafe prompts with the model's own refusals. A row has `prompt` (text or
            messages) and `response` or `completion`, or `messages` (the last one is the response),
            or `input_ids` and `labels` (-100 outside the response).
        safegrad: Options; None for the defaults.
        train_dataset: User rows in one of these formats, or any data set for your `data_collator`.
        eval_dataset: The same, or a mapping from names to such data sets.
        data_collator: For the user rows; None pads to `input_ids`, `attention_mask`, `labels`.
        processing_class: The tokenizer; optional if all rows are tokenised.
        alignment_loss: Your own alignment loss, called as `alignment_loss(batch, model,
            normalizer=n)` with `input_ids`, `attention_mask` and `labels` in `batch`. Must return
            the sum over the response tokens of the batch divided by n, differentiable through
            `model`, which may be wrapped.
        **options: Further arguments of `transformers.Trainer`, except `model_init`.

    Raises:
        TypeError: `safegrad` or `alignment_dataset` has another type.
        ValueError: There are no alignment rows, a row has no response tokens or is too long, the
            setup is not supported, or the options do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *,
        alignment_dataset: Any = None,
        safegrad: SafeGradConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
        alignment_loss: AlignmentLoss | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module) or options.get("model_init") is not None:
            raise ValueError(
                "gradsafe.SafeGradTrainer: expected model=; model_init= is not supported"
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or row_collator(processing_class, model),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            alignment_dataset=alignment_dataset,
            safegrad=safegrad,
            alignment_loss=alignment_loss,
            **options,
        )
        self.train_dataset = self._encode_text("train_dataset", train_dataset)
        self.eval_dataset = self._encode_text("eval_dataset", eval_dataset)

    def _encode_text(self, name: str, rows: Any) -> Any:
        if isinstance(rows, Mapping):  # several sets by name
            return {key: self._encode_text(f"{name}[{key!r}]", rows[key]) for key in rows}
        return self._encode(name, rows) if has_text(rows) else rows

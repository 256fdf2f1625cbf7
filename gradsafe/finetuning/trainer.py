"""SafeGrad on top of the trainer of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.finetuning.protection import AlignmentLoss, SafeGradMixin, encoding
from gradsafe.finetuning.rows import RowCollator, encode_rows, has_text
from gradsafe.finetuning.support import check_alignment
from gradsafe.models import pad_token_id


class SafeGradTrainer(SafeGradMixin):
    """A `transformers.Trainer` whose every step is protected by gradient surgery (SafeGrad).

    Once per optimizer step, after the last micro-batch of user data and its reduction over
    processes, the accumulated user gradient is stashed, the gradient of the alignment loss on the
    next alignment rows is computed (in micro-batches of the user batch's size, reduced likewise),
    and both are merged; clipping and the optimizer see the merged gradient. The alignment rows are
    drawn in seeded passes over all of them; every process takes its share of each draw, so the
    result does not depend on the number of processes.

    Logged beside the loss, as means since the last log: `safegrad/cosine`,
    `safegrad/conflict_rate`, `safegrad/user_norm`, `safegrad/align_norm`, `safegrad/kl` (the
    alignment loss), and `safegrad/skipped_steps` since `train` was called. A negative cosine is the
    alarm for poisoned user data; the conflict rate alone is not (0.45 is chance). Norms are those
    of scaled gradients under fp16.

    A step with a gradient that is not finite changes nothing and is counted; to know, the host
    waits for the device once per optimizer step (not in fp16, where the loss scaler decides).

    Needs one process per device, each with the whole model (DDP) or a piece of it (FSDP2, with
    `fsdp=True`; a second model as reference stays whole on every device). Not supported, and
    refused: DeepSpeed, FSDP1, models sharded while they are loaded (`DistributedConfig`),
    `nn.DataParallel`, optimizers that step inside the backward pass (lomo, layerwise),
    `ddp_static_graph`. Under `torch_compile=True` (not with FSDP2) the alignment pass runs
    uncompiled.

    Args:
        model: A causal language model, with or without PEFT adapters.
        args: `transformers.TrainingArguments`.
        alignment_dataset: Rows that show the behaviour to keep, in the style of the harm that is
            expected: about 100 unsafe prompts with the model's own refusals. Rows are mappings with
            `prompt` and `response`, or with `input_ids` and `labels` (-100 outside the response).
        safegrad: Options; None for the paper's.
        train_dataset: User rows, of either form, or anything else that your `data_collator` turns
            into batches.
        eval_dataset: Likewise, or a mapping from names to such sets.
        data_collator: For the user rows; None pads to `input_ids`, `attention_mask`, `labels`.
        processing_class: The tokenizer; only tokenised rows do without.
        alignment_loss: Your own loss in place of the configured one: called as
            `alignment_loss(batch, model, normalizer=n)` with `input_ids`, `attention_mask` and
            `labels`; returns the sum over the response tokens of the batch divided by n, with a
            graph through `model`, which may be wrapped.
        **options: As of `transformers.Trainer`, except `model_init`.

    Raises:
        TypeError: `safegrad` or `alignment_dataset` is of another type.
        ValueError: No alignment rows, a row without response tokens or too long, a setup that is
            not supported, or options that do not fit the model.
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
                "gradsafe.SafeGradTrainer: expected model=, model_init= cannot be used"
            )
        check_alignment(alignment_dataset, safegrad)  # before long work on the user rows
        progress = not getattr(args, "disable_tqdm", False)
        given = encoding(safegrad or SafeGradConfig(), model, processing_class, progress)
        if has_text(train_dataset):
            train_dataset = encode_rows("train_dataset", train_dataset, **given)
        if isinstance(eval_dataset, Mapping):  # several sets by name
            eval_dataset = {
                name: encode_rows(f"eval_dataset[{name!r}]", rows, **given)
                if has_text(rows)
                else rows
                for name, rows in eval_dataset.items()
            }
        elif has_text(eval_dataset):
            eval_dataset = encode_rows("eval_dataset", eval_dataset, **given)
        if data_collator is None:
            pad_id = 0 if processing_class is None else pad_token_id(processing_class)
            data_collator = RowCollator(pad_id)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            alignment_dataset=alignment_dataset,
            safegrad=safegrad,
            alignment_loss=alignment_loss,
            **options,
        )

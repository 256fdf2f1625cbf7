"""Unlearning of training rows, protected by gradient surgery: NPO and gradient difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradsafe._checks import refuse
from gradsafe.finetuning.config import SafeGradConfig, UnlearningConfig
from gradsafe.finetuning.output_head import inference
from gradsafe.finetuning.rows import IGNORED, RowCollator, row_collator
from gradsafe.finetuning.trainer import SafeGradTrainer
from gradsafe.models.inspection import forward_parameters, unwrapped


def npo_loss(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation: -(2 / beta) * mean log sigmoid(-beta * log(pi / pi_ref)).

    arXiv 2404.05868, equation 3. Its gradient is that of the mean log-probability times the weight
    2 pi^beta / (pi^beta + pi_ref^beta), which is 1 at the start and falls to 0 as the rows are
    forgotten, so the loss is bounded from below; for beta to 0 it is gradient ascent.

    Args:
        log_probs: Log-probability of each row's response, `[B]`.
        reference: The same under the model before unlearning, `[B]`.
        beta: Inverse temperature, above 0.

    Returns:
        Scalar.
    """
    return -2 / beta * functional.logsigmoid(-beta * (log_probs - reference)).mean()


def ascent_loss(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The mean log-probability per response token, which gradient difference minimises.

    Not bounded from below: too many steps destroy the model.

    Args:
        log_probs: Log-probability of each row's response, `[B]`.
        tokens: Number of its tokens, `[B]`.

    Returns:
        Scalar.
    """
    return log_probs.sum() / tokens.sum()


def response_log_probs(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability of every response, and its number of tokens.

    Args:
        model: A causal language model, wrapped or not.
        batch: `input_ids`, `attention_mask` and `labels` (-100 outside the response), `[B, T]`.

    Returns:
        `[B]` float32, differentiable, and `[B]` int64.
    """
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if "position_ids" in forward_parameters(unwrapped(model)):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:].to(logits.device)
    nll = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -nll.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


class UnlearningTrainer(SafeGradTrainer):
    """A `SafeGradTrainer` that unlearns its user rows.

    The gradient of the rows to forget takes the place of the user gradient, that of the rows to
    retain the place of the alignment gradient: where forgetting would raise the retain loss, that
    component is removed, and the retain gradient is added with the weight `safegrad.rho`. With
    `safegrad.projection=False` both are added as they are, as published.

    The KL loss of SafeGrad keeps the answers of the model as it is now: `reference` is "cached" or
    a second model, since "adapter_off" would be the model before it learned anything.

    Args:
        model: The model that learned the rows, see `SafeGradTrainer`.
        args: `transformers.TrainingArguments`.
        forget_dataset: Rows to forget, in the formats of `SafeGradTrainer`.
        retain_dataset: Rows that show what must stay, none of which is to be forgotten.
        unlearning: Options; None for the defaults.
        safegrad: Options of the surgery and of the retain loss; None for the defaults with
            `reference="cached"`.
        processing_class: The tokenizer; optional if all rows are tokenised.
        **options: Further arguments of `SafeGradTrainer`, but for `eval_dataset`, since the loss is
            one of forgetting, and `data_collator`.

    Raises:
        TypeError, ValueError: As in `SafeGradTrainer`, `reference` is "adapter_off" with the KL
            loss, or a row is to be both forgotten and retained.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        unlearning: UnlearningConfig | None = None,
        safegrad: SafeGradConfig | None = None,
        processing_class: Any = None,
        **options: Any,
    ) -> None:
        safegrad = safegrad or SafeGradConfig(reference="cached")
        if safegrad.loss == "kl" and safegrad.reference == "adapter_off":
            raise ValueError(
                'gradsafe.UnlearningTrainer: reference="adapter_off" is the model before it '
                'learned anything; use reference="cached", a second model, or loss="sft"'
            )
        if forget_dataset is None:
            refuse("UnlearningTrainer", "forget_dataset", "None", "give the rows to forget")
        for name in ("eval_dataset", "data_collator"):
            if options.get(name) is not None:
                expected, do = f"no {name}", "leave it out, and evaluate the trained model"
                refuse("UnlearningTrainer", expected, type(options[name]).__name__, do)
        self.unlearning = unlearning or UnlearningConfig()
        super().__init__(
            model,
            args,
            alignment_dataset=retain_dataset,
            safegrad=safegrad,
            train_dataset=forget_dataset,
            processing_class=processing_class,
            **options,
        )
        self.model_accepts_loss_kwargs = False  # a mean per batch, scaled by the accumulation
        self.train_dataset = self._encode("forget_dataset", self.train_dataset)
        self._refuse_overlap()
        self._references = self._log_probs_now() if self.unlearning.method == "npo" else {}
        self.data_collator = _WithReferences(
            self._references, row_collator(processing_class, model)
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of one batch of rows to forget."""
        log_probs, tokens = response_log_probs(model, inputs)
        if self.unlearning.method == "graddiff":
            return ascent_loss(log_probs, tokens)
        return npo_loss(log_probs, inputs["reference"].to(log_probs), self.unlearning.beta)

    def _log_probs_now(self) -> dict[tuple[int, ...], float]:
        """Log-probability of each row under the model before the first step."""
        rows: Any = self.train_dataset
        found: list[float] = []
        assert self.model is not None
        with inference(self.model), self.accelerator.autocast():
            for start in range(0, len(rows), self._train_batch_size):
                some = self._collate(rows[start : start + self._train_batch_size])
                found += response_log_probs(self.model, self._prepare_inputs(some))[0].tolist()
        return {_key(row): value for row, value in zip(rows, found, strict=True)}

    def _refuse_overlap(self) -> None:
        retained = {_key(row): index for index, row in enumerate(self._alignment_rows)}
        rows: Any = self.train_dataset
        for index, row in enumerate(rows):
            if (other := retained.get(_key(row))) is not None:
                raise ValueError(
                    f"gradsafe.UnlearningTrainer: forget_dataset[{index}] is the same row as "
                    f"retain_dataset[{other}]; remove it from one of them"
                )

    def _identity(self) -> dict[str, Any]:
        own = self.unlearning
        return {**super()._identity(), "unlearning": own.method, "beta": own.beta}


class _WithReferences:
    """Collates rows as `RowCollator`, and adds their `reference` `[B]`."""

    def __init__(self, references: Mapping[tuple[int, ...], float], collate: RowCollator) -> None:
        self._references, self._collate = references, collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self._collate(rows)
        if self._references:
            batch["reference"] = torch.tensor([self._references[_key(row)] for row in rows])
        return batch


def _key(row: Mapping[str, Any]) -> tuple[int, ...]:
    """A row by its ids and where its response begins."""
    asked = sum(label == IGNORED for label in row["labels"])
    return (asked, *map(int, row["input_ids"]))

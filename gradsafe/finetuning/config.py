"""The options of SafeGrad in one record."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import nn

from gradsafe.finetuning.alignment import KLTokens
from gradsafe.finetuning.surgery import Scope
from gradsafe.ops.surgery import check_rho

Loss = Literal["kl", "sft"]
Reference = Literal["adapter_off", "cached"]


@dataclass(frozen=True)
class SafeGradConfig:
    """Options of `SafeGradTrainer`; the defaults are the paper's (arXiv 2508.07172).

    Attributes:
        rho: Weight of the alignment gradient.
        loss: Alignment loss: "kl" to a reference model, or "sft", cross-entropy on the responses.
        reference: Where the KL's reference comes from: "adapter_off" (the model without its PEFT
            adapters), "cached" (its final hidden states on the alignment rows, computed before
            training; the output head must be frozen), or a frozen model.
        kl_tokens: Positions that count: "response", "non_pad" (prompt too) or "all" (padding too,
            as in the authors' code).
        scope: What one conflict test covers, see `GradientSurgery`.
        projection: False is the ablation without projection.
        alignment_batch_size: Alignment rows per optimizer step, over all processes together. None:
            as many as user rows.
        alignment_seed: Of the order of the alignment rows. None: the seed of the data.
        template: Prompt template, see `gradsafe.models.encode`; None for the tokenizer's own.
        system: System message (the authors use "You are a helpful assistant.").
        append_eos: Close every response with EOS, so that the model learns to stop.
        max_length: Longest row in tokens; None for the model's context. Longer rows are refused.
        warn_cosine: Warn when the mean cosine over `warn_steps` steps is smaller than this: the
            alignment rows then have nothing to say about what the user data teaches. 0: never.
        warn_steps: Steps of that mean.
    """

    rho: float = 1.0
    loss: Loss = "kl"
    reference: Reference | nn.Module = "adapter_off"
    kl_tokens: KLTokens = "response"
    scope: Scope = "global"
    projection: bool = True
    alignment_batch_size: int | None = None
    alignment_seed: int | None = None
    template: str | None = None
    system: str | None = None
    append_eos: bool = True
    max_length: int | None = None
    warn_cosine: float = 0.005
    warn_steps: int = 100

    def __post_init__(self) -> None:
        check_rho("SafeGradConfig", self.rho)
        for name, kind in (("loss", Loss), ("kl_tokens", KLTokens), ("scope", Scope)):
            self._check_choice(name, get_args(kind))
        if not isinstance(self.reference, nn.Module):
            self._check_choice("reference", get_args(Reference), " or a model")
        for name, least in (("alignment_batch_size", 1), ("max_length", 2), ("warn_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(
                    f"gradsafe.SafeGradConfig: expected {name} >= {least}, got {value}"
                )

    def _check_choice(self, name: str, allowed: tuple[str, ...], more: str = "") -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(
                f"gradsafe.SafeGradConfig: expected {name} in {list(allowed)}{more}, got {value!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a reference that is a model becomes "model"."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.reference, nn.Module):
            values["reference"] = "model"
        return values

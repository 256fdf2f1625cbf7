"""The options of SafeGrad and of unlearning. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from gradsafe._checks import check_fields, refuse
from gradsafe.models.encoding import Encoding

Loss = Literal["kl", "sft"]
KLTokens = Literal["response", "non_pad", "all"]
Scope = Literal["global", "tensor", "layer"]
Forgetting = Literal["npo", "graddiff"]

_LEAST = {"rho": 0, "alignment_batch_size": 1, "max_length": 2, "warn_cosine": 0, "warn_steps": 1}


@dataclass(frozen=True)
class SafeGradConfig:
    """Options of `SafeGradTrainer`; the defaults are those of the paper (arXiv 2508.07172).

    Attributes:
        rho: Weight of the alignment gradient in the merged gradient.
        loss: Alignment loss: "kl" (divergence from a reference model) or "sft" (cross-entropy on
            the responses of the alignment rows).
        reference: Reference model of the KL loss: "adapter_off" (the model without its PEFT
            adapters), "cached" (the final hidden states of the model on the alignment rows before
            training; needs a frozen output head), or a second, frozen model: in Python the model
            itself, on the command line its folder or Hub id.
        kl_tokens: Positions included in the KL loss: "response", "non_pad" (prompt and response) or
            "all" (padding too, as in the authors' code).
        scope: What one conflict test covers: "global" (all parameters), "layer" or "tensor".
        projection: Remove the conflicting component of the user gradient. False is the ablation
            without projection, a weighted sum of both gradients.
        alignment_batch_size: Alignment rows per optimizer step, summed over all processes. None
            means as many as user rows.
        alignment_seed: Seed of the order of the alignment rows. None means the seed of the data.
        template: Prompt template, see `gradsafe.models.encode`. None means the chat template of the
            tokenizer.
        system: System message (the authors use "You are a helpful assistant.").
        append_eos: End every response with EOS, so that the model learns to stop.
        max_length: Maximum number of tokens per row. Longer rows are an error. None means the
            model's context length.
        split_special_tokens: Tokenise special tokens that the text of a prompt holds as ordinary
            text, not as control tokens; those of the template and of a response stay special.
        warn_cosine: Warn if the mean cosine over `warn_steps` steps is closer to 0 than this: the
            alignment rows then give no protection against this user data. 0 disables the warning.
        warn_steps: Number of steps of that mean.
    """

    rho: float = 1.0
    loss: Loss = "kl"
    reference: str | object = "adapter_off"
    kl_tokens: KLTokens = "response"
    scope: Scope = "global"
    projection: bool = True
    alignment_batch_size: int | None = None
    alignment_seed: int | None = None
    template: str | None = None
    system: str | None = None
    append_eos: bool = True
    max_length: int | None = None
    split_special_tokens: bool = False
    warn_cosine: float = 0.005
    warn_steps: int = 100

    def __post_init__(self) -> None:
        check_fields("SafeGradConfig", self, _LEAST)
        if not (self.has_model or (isinstance(self.reference, str) and self.reference)):
            raise TypeError(
                'gradsafe.SafeGradConfig: expected reference to be "adapter_off", "cached", a '
                f"model, or the folder or Hub id of a model, got {self.reference!r}"
            )

    @property
    def has_model(self) -> bool:
        """Whether `reference` is a model, not a word or the place of a model."""
        return callable(getattr(self.reference, "parameters", None))

    @property
    def encoding(self) -> Encoding:
        """The options that decide the token ids of a row, whatever its length."""
        names = ("template", "system", "append_eos", "split_special_tokens")
        return Encoding(**{name: getattr(self, name) for name in names})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a reference that is a model becomes "model"."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "reference": "model"} if self.has_model else values


@dataclass(frozen=True)
class UnlearningConfig:
    """Options of `UnlearningTrainer`.

    Attributes:
        method: Loss of the rows to forget: "npo" (negative preference optimisation, arXiv
            2404.05868) or "graddiff" (gradient ascent, as in gradient difference).
        beta: Inverse temperature of NPO, above 0: the larger, the earlier it stops.
    """

    method: Forgetting = "npo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_fields("UnlearningConfig", self)
        if self.beta <= 0:
            refuse("UnlearningConfig", "beta above 0", self.beta)

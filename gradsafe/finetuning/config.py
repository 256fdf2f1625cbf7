"""The options of SafeGrad. Importing this module does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

Loss = Literal["kl", "sft"]
KLTokens = Literal["response", "non_pad", "all"]
Scope = Literal["global", "tensor", "layer"]

_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a string"),
}
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
    warn_cosine: float = 0.005
    warn_steps: int = 100

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(SafeGradConfig).items():
            value = getattr(self, name)
            kind, *optional = get_args(hint) or (hint,)
            if get_origin(hint) is Literal:
                check_choice("SafeGradConfig", name, value, hint)
            elif name == "reference":
                if not (self.has_model or (isinstance(value, str) and value)):
                    places = '"adapter_off", "cached", a model, or the folder or Hub id of a model'
                    raise self._error(TypeError, name, places)
            elif not (value is None and optional):
                self._check(name, kind, " or None" if optional else "")

    def _check(self, name: str, kind: type, or_none: str) -> None:
        allowed, words = _KINDS[kind]
        value: Any = getattr(self, name)
        fits = isinstance(value, allowed) and isinstance(value, bool) == (kind is bool)
        if not fits:
            raise self._error(TypeError, name, words + or_none)
        least = _LEAST.get(name, -math.inf)
        if kind is not str and not least <= value < math.inf:
            finite = "finite and " if kind is float else ""
            raise self._error(ValueError, name, f"{finite}>= {least}{or_none}")
        object.__setattr__(self, name, kind(value))  # numbers of NumPy are not JSON

    def _error(self, kind: type[Exception], name: str, expected: str) -> Exception:
        value = getattr(self, name)
        return kind(f"gradsafe.SafeGradConfig: expected {name} to be {expected}, got {value!r}")

    @property
    def has_model(self) -> bool:
        """Whether `reference` is a model, not a word or the place of a model."""
        return callable(getattr(self.reference, "parameters", None))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a reference that is a model becomes "model"."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "reference": "model"} if self.has_model else values


def check_choice(owner: str, name: str, value: object, kind: Any) -> None:
    """Raises ValueError if `value` is not one of the values of the Literal type `kind`."""
    if value not in get_args(kind):
        raise ValueError(
            f"gradsafe.{owner}: expected {name} in {list(get_args(kind))}, got {value!r}"
        )

"""The output head of a language model, which maps final hidden states to logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe._checks import refuse
from gradsafe.models.inspection import text_config, unwrapped
from gradsafe.models.modes import evaluating
from gradsafe.models.threads import alone, own

Transform = Callable[[Tensor], Tensor]

# Transforms of the head's output, by the config entry that holds their constant. The entries only
# propose candidates; a comparison with the model's own logits selects one.
_TRANSFORMS: dict[str, Callable[[float], Transform]] = {
    "final_logit_softcapping": lambda cap: lambda logits: cap * torch.tanh(logits / cap),
    "logit_scale": lambda scale: lambda logits: logits * scale,
    "logits_scaling": lambda scale: lambda logits: logits / scale,
    "lm_head_multiplier": lambda scale: lambda logits: logits * scale,
}


@contextmanager
def inference(model: nn.Module, part: nn.Module | None = None) -> Iterator[None]:
    """Eval mode (of one part) and no gradients inside the block; restores every module's mode."""
    with alone(model), evaluating(part or model, ()), torch.no_grad():
        yield


@dataclass
class OutputHead:
    """The output head of a model, and the transform from its output to the logits (or None)."""

    module: nn.Module
    transform: Transform | None
    name: str
    _candidates: list[Transform | None] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> OutputHead:
        """Finds the head of a transformers model, wrapped or not."""
        inner: Any = unwrapped(model)
        getter = getattr(inner, "get_output_embeddings", None)
        module = getter() if callable(getter) else None
        if not isinstance(module, nn.Module):
            expected = "a causal language model with an output head (get_output_embeddings)"
            refuse("KLAlignment", expected, type(inner).__name__)
        config = text_config(inner)
        constants = {key: getattr(config, key, None) for key in _TRANSFORMS}
        candidates = [
            _TRANSFORMS[key](float(constant))
            for key, constant in constants.items()
            if isinstance(constant, (int, float)) and constant
        ]
        return cls(module, None, type(inner).__name__, [*candidates, None])

    @property
    def plain(self) -> bool:
        """Whether it is a linear layer without a transform: its gradient has a closed form."""
        return self.linear and self.transform is None

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer without adapters or quantisation."""
        # Not isinstance: FSDP2 replaces the class by a subclass with the same forward.
        return getattr(type(self.module), "forward", None) is nn.Linear.forward

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The trainable parameters of the head."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def ready(self, hidden: Tensor) -> Tensor:
        """Return the states in the dtype of the head, unless autocast converts them."""
        weight = getattr(self.module, "weight", None)
        if torch.is_autocast_enabled(hidden.device.type) or not isinstance(weight, Tensor):
            return hidden
        return hidden.to(weight.dtype) if weight.is_floating_point() else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits `[N, V]` of states `[N, d]`."""
        out = self.project(self.ready(hidden))
        return out if self.transform is None else self.transform(out)

    def project(self, hidden: Tensor) -> Tensor:
        """Calls the head without its hooks, which belong to the model's own call of it."""
        return self.module.forward(hidden)

    def run(
        self, model: nn.Module, inputs: dict[str, Tensor], loss: Transform | None = None
    ) -> Tensor:
        """Return the final hidden states `[B, T, d]` of a forward pass of `model`, or their loss.

        The pass calls `model` itself, so that the hooks of DDP and others run, but the head gets no
        position (one the first time, to find the transform). `loss` is computed within the call of
        the head: only there FSDP2 has gathered its weights, and reduces their gradients.
        """
        if loss is not None and self._candidates:
            with inference(model):
                self.run(model, inputs)  # the loss needs the transform
        seen: list[Tensor] = []
        found: list[Tensor] = []
        kept = 1 if self._candidates else 0

        def capture(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]
            seen.append(hidden)
            if is_sharded(self.module):  # FSDP2 has gathered its weights here
                raise ValueError(
                    f"gradsafe.KLAlignment: the output head of {self.name} is sharded (DTensor) "
                    "also within the model's own forward; shard it with FSDP2 (fully_shard), not "
                    "by tensor parallelism"
                )
            if kept:
                with torch.no_grad():
                    found.append(self.project(hidden[:, :kept]))
            elif loss is not None and hidden.dim() == 3:
                found.append(loss(hidden))
            return (hidden[:, :kept], *args[1:])

        handle = self.module.register_forward_pre_hook(own(capture))
        try:
            output = model(**inputs)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0].dim() != 3:
            expected = f"the forward of {self.name} to call its output head once with hidden states"
            refuse("KLAlignment", f"{expected} [B, T, d]", f"{len(seen)} calls", kind=RuntimeError)
        logits = output.logits if hasattr(output, "logits") else output[0]
        if kept:
            self._choose_transform(found[0], logits)
        if loss is None:
            return seen[0]
        # FSDP2 attaches its hooks of the backward pass to the model's output.
        return found[0] + logits.sum() if is_sharded(model) else found[0]

    @torch.no_grad()
    def _choose_transform(self, out: Tensor, logits: Tensor) -> None:
        if not bool(logits.isfinite().all()):
            raise ValueError(
                f"gradsafe.KLAlignment: the model's logits hold NaN or Inf ({self.name}, first "
                "alignment batch); check its weights, or use another dtype"
            )
        tolerance = 32 * torch.finfo(out.dtype).eps
        scale = float(logits.abs().max()) + 1e-30
        worst = math.inf
        for candidate in self._candidates:
            expected = out if candidate is None else candidate(out)
            if expected.shape != logits.shape:
                continue
            worst = min(worst, float((expected - logits).abs().max()) / scale)
            if worst <= tolerance:
                self.transform, self._candidates = candidate, []
                return
        raise RuntimeError(
            f"gradsafe.KLAlignment: the logits of {self.name} are not those of its output head "
            f"(relative difference {worst:.1e}), nor with one of the known transforms "
            f"{list(_TRANSFORMS)}; this model family is not supported"
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module is a DTensor."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())

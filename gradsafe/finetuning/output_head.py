"""The output head of a language model: where hidden states become logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.models.inspection import base_model, text_config

Transform = Callable[[Tensor], Tensor]


def _soft_cap(cap: float) -> Transform:
    return lambda logits: cap * torch.tanh(logits / cap)


# What families do to the head's output, by the config entry that says so. The names only propose: a
# comparison with the model's own logits decides.
_TRANSFORMS: dict[str, Callable[[float], Transform]] = {
    "final_logit_softcapping": _soft_cap,
    "logit_scale": lambda scale: lambda logits: logits * scale,
    "logits_scaling": lambda scale: lambda logits: logits / scale,
    "lm_head_multiplier": lambda scale: lambda logits: logits * scale,
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, `torch.compile` and PEFT wrappers."""
    while True:
        inner = model.module if isinstance(getattr(model, "module", None), nn.Module) else model
        inner = base_model(inner)  # type: ignore[arg-type]
        if inner is model:
            return model
        model = inner


@dataclass
class OutputHead:
    """The head of one model, and what happens to its output before it is called logits.

    Attributes:
        module: the head; its input are the final hidden states `[..., d]`.
        transform: from the head's output to the logits, None if they are the same.
        name: of the model, for errors.
    """

    module: nn.Module
    transform: Transform | None
    name: str
    _candidates: list[Transform | None] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> OutputHead:
        """Finds the head of a transformers model, wrapped or not.

        Raises:
            ValueError: the model has no output embeddings, or they are sharded.
        """
        inner: Any = unwrapped(model)
        getter = getattr(inner, "get_output_embeddings", None)
        module = getter() if callable(getter) else None
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"gradsafe.KLAlignment: expected a causal language model with an output head "
                f"(get_output_embeddings), got {type(inner).__name__}"
            )
        if any(hasattr(p, "full_tensor") for p in module.parameters()):
            raise ValueError(
                "gradsafe.KLAlignment: the output head is sharded (DTensor); leave it out of "
                "fully_shard, since the loss reads it outside of the model's forward"
            )
        config = text_config(inner)
        named = [(build, getattr(config, key, None)) for key, build in _TRANSFORMS.items()]
        found: list[Transform | None] = [
            build(float(value))
            for build, value in named
            if isinstance(value, (int, float)) and value
        ]
        return cls(module, None, type(inner).__name__, [*found, None])

    @property
    def plain(self) -> bool:
        """A linear layer and nothing else: its gradient has a closed form."""
        return type(self.module) is nn.Linear and self.transform is None

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the head that are trained."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def ready(self, hidden: Tensor) -> Tensor:
        """The states in the dtype of the head, unless autocast sees to that."""
        weight = getattr(self.module, "weight", None)
        if torch.is_autocast_enabled(hidden.device.type) or not isinstance(weight, Tensor):
            return hidden
        return hidden.to(weight.dtype) if weight.is_floating_point() else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, V]` from `[N, d]`."""
        out = self.module(self.ready(hidden))
        return out if self.transform is None else self.transform(out)

    def run(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The final hidden states `[B, T, d]` of one forward pass of `model`.

        The pass goes through `model` itself, so that the hooks of DDP and of others fire, but the
        head sees no position (one position the first time, to check the transform), so that
        `[B, T, V]` never exists.

        Raises:
            RuntimeError: the forward did not call the head once, or its logits are not what the
                head and a known transform give.
        """
        seen: list[Tensor] = []
        kept = 1 if self._candidates else 0

        def capture(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(args[0])
            return (args[0][:, :kept], *args[1:])

        handle = self.module.register_forward_pre_hook(capture)
        try:
            output = model(**inputs)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0].dim() != 3:
            raise RuntimeError(
                f"gradsafe.KLAlignment: expected the forward of {self.name} to call its output "
                f"head once with hidden states [B, T, d], got {len(seen)} calls"
            )
        if self._candidates:
            logits = output.logits if hasattr(output, "logits") else output[0]
            self._choose_transform(seen[0], logits)
        return seen[0]

    @torch.no_grad()
    def _choose_transform(self, hidden: Tensor, logits: Tensor) -> None:
        out = self.module(hidden[:, :1])
        tolerance = 32 * torch.finfo(out.dtype).eps
        worst = math.inf
        for candidate in self._candidates:
            expected = out if candidate is None else candidate(out)
            if expected.shape != logits.shape:
                continue
            scale = float(logits.abs().max()) + 1e-30
            worst = min(worst, float((expected - logits).abs().max()) / scale)
            if worst <= tolerance:
                self.transform = candidate
                self._candidates = []
                break
        else:
            raise RuntimeError(
                f"gradsafe.KLAlignment: the logits of {self.name} are not those of its output head "
                f"(relative difference {worst:.1e}), nor with one of the known transforms "
                f"{list(_TRANSFORMS)}; this family is not supported"
            )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's flag is restored."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag

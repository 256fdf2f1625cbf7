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
            ValueError: the model has no output embeddings.
        """
        inner: Any = unwrapped(model)
        getter = getattr(inner, "get_output_embeddings", None)
        module = getter() if callable(getter) else None
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"gradsafe.KLAlignment: expected a causal language model with an output head "
                f"(get_output_embeddings), got {type(inner).__name__}"
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
        return self.linear and self.transform is None

    @property
    def linear(self) -> bool:
        """A linear layer without adapters or quantisation; FSDP2 makes a class of its own of it."""
        return getattr(type(self.module), "forward", None) is nn.Linear.forward

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the head that are trained."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def sharded(self) -> bool:
        """Whether its weights are in pieces now; within the model's forward FSDP2 gathers them."""
        return any(map(is_sharded, self.module.parameters()))

    def ready(self, hidden: Tensor) -> Tensor:
        """The states in the dtype of the head, unless autocast sees to that."""
        weight = getattr(self.module, "weight", None)
        if torch.is_autocast_enabled(hidden.device.type) or not isinstance(weight, Tensor):
            return hidden
        return hidden.to(weight.dtype) if weight.is_floating_point() else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, V]` from `[N, d]`."""
        out = self.project(self.ready(hidden))
        return out if self.transform is None else self.transform(out)

    def project(self, hidden: Tensor) -> Tensor:
        """The head without its hooks, which belong to the model's own call of it."""
        out: Tensor = self.module.forward(hidden)
        return out

    def run(
        self, model: nn.Module, inputs: dict[str, Tensor], loss: Transform | None = None
    ) -> Tensor:
        """The final hidden states `[B, T, d]` of one forward pass of `model`, or a loss of them.

        The pass goes through `model` itself, so that the hooks of DDP and of others fire, but the
        head sees no position (one position the first time, to check the transform), so that
        `[B, T, V]` never exists.

        Args:
            model: the model, wrapped or not.
            inputs: of its forward.
            loss: computed from the states where the head is called, since only there FSDP2 has its
                weights together; its gradients to them are then reduced like all others.

        Raises:
            RuntimeError: the forward did not call the head once, or its logits are not what the
                head and a known transform give.
            ValueError: the head is sharded by something else than FSDP2.
        """
        if loss is not None and self._candidates:
            with eval_mode(model):
                self.run(model, inputs)  # the loss needs the transform
        seen: list[Tensor] = []
        found: list[Tensor] = []
        kept = 1 if self._candidates else 0

        def capture(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]
            seen.append(hidden)
            self._refuse_pieces()
            if kept:
                with torch.no_grad():
                    found.append(self.project(hidden[:, :kept]))
            elif loss is not None and hidden.dim() == 3:
                found.append(loss(hidden))
            return (hidden[:, :kept], *args[1:])

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
        logits = output.logits if hasattr(output, "logits") else output[0]
        if kept:
            self._choose_transform(found[0], logits)
        if loss is None:
            return seen[0]
        # The hooks of FSDP2 before the backward pass are on the model's output.
        return found[0] + logits.sum() if any(map(is_sharded, model.parameters())) else found[0]

    def _refuse_pieces(self) -> None:
        if self.sharded:
            raise ValueError(
                f"gradsafe.KLAlignment: the output head of {self.name} is sharded (DTensor) within "
                "the model's own forward, too; shard it with FSDP2 (fully_shard), not by tensor "
                "parallelism"
            )

    @torch.no_grad()
    def _choose_transform(self, out: Tensor, logits: Tensor) -> None:
        if not bool(logits.isfinite().all()):
            raise RuntimeError(
                f"gradsafe.KLAlignment: the model's logits hold NaN or Inf ({self.name}, first "
                "alignment batch); look at its weights, or use another dtype"
            )
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


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(parameter, "full_tensor")


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

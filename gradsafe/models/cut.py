"""Where the graph begins: nothing below the first scored block is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.models.inspection import base_model


class Cut:
    """Forward pre-hook that detaches a block's hidden states: no graph below this block."""

    def __init__(self, running: Callable[[], bool], *, requires_grad: bool) -> None:
        # Reentrant checkpointing builds no graph unless an input of the block requires grad.
        self.requires_grad = requires_grad
        self.running = running
        self.done = False  # a block that runs again in the same pass is not cut again

    def begin(self, *_: Any) -> None:
        """A forward pass of the model begins."""
        self.done = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Detach the hidden states on their way into the block."""
        if not torch.is_grad_enabled() or (self.done and self.running()):
            return None
        self.done = True
        if args and isinstance(args[0], Tensor):
            return (self._detach(args[0]), *args[1:]), kwargs
        hidden = kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            return args, {**kwargs, "hidden_states": self._detach(hidden)}
        raise RuntimeError(
            f"gradsafe.capture: expected the block {type(module).__name__} to receive its hidden "
            f"states as first argument or as hidden_states="
        )

    def _detach(self, hidden: Tensor) -> Tensor:
        return hidden.detach().requires_grad_(self.requires_grad)


def differentiable_embedding(model: nn.Module) -> Any:
    """Make the embedding's output require grad, for cuts that lie inside a checkpoint."""
    base: Any = base_model(model)
    return base.get_input_embeddings().register_forward_hook(differentiable_output)


def differentiable_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: a graph starts at the module's output (or its first), and not before."""
    if not torch.is_grad_enabled():
        return output
    if isinstance(output, tuple):
        return (output[0].detach().requires_grad_(True), *output[1:])
    return output.detach().requires_grad_(True)

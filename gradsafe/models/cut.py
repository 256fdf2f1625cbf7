"""Where the graph begins: nothing below the first scored block is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.models.compat import hooks_inside_checkpoint
from gradsafe.models.inspection import base_model
from gradsafe.models.modes import decoder_loop
from gradsafe.models.threads import own


def start_graph(
    model: nn.Module,
    blocks: nn.ModuleList,
    start: int,
    checkpointed: Sequence[nn.Module],
    running: Callable[[], bool],
) -> Iterator[Any]:
    """Register hooks under which the graph starts in front of block `start`; yields their handles.

    `checkpointed` is from `checkpointing_modules`; `running` says whether the model's forward runs,
    and not a recomputation.
    """
    inside = any(map(hooks_inside_checkpoint, checkpointed))
    if inside and len({id(block) for block in blocks}) < len(blocks):
        raise RuntimeError(
            "gradsafe.capture: this version of transformers runs hooks within activation "
            "checkpoints, where a block that occurs twice in the decoder cannot be followed; "
            "switch checkpointing off, or update transformers"
        )
    cuts = {0, start}
    if inside and start > 0:
        cuts = {0}  # and one in front of the checkpoint
        yield blocks[start - 1].register_forward_hook(own(_differentiable_output))
    elif inside or decoder_loop(model, blocks) in checkpointed:
        # Here a cut is inside the checkpoint, and the reentrant kind needs an unbroken chain of
        # inputs that require grad, from the embedding up to the first scored block.
        cuts = {start}
        base: Any = base_model(model)
        yield base.get_input_embeddings().register_forward_hook(own(_differentiable_output))
    for index in cuts:
        cut = _Cut(running, requires_grad=bool(checkpointed) and index == start)
        yield model.register_forward_pre_hook(own(cut.begin))
        yield blocks[index].register_forward_pre_hook(own(cut), with_kwargs=True)


class _Cut:
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
        if not torch.is_grad_enabled() or (self.done and self.running()):
            return None
        self.done = True
        if args and isinstance(args[0], Tensor):
            return (_leaf(args[0], self.requires_grad), *args[1:]), kwargs
        hidden = kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            return args, {**kwargs, "hidden_states": _leaf(hidden, self.requires_grad)}
        raise RuntimeError(
            f"gradsafe.capture: expected the block {type(module).__name__} to receive its hidden "
            f"states as first argument or as hidden_states="
        )


def _differentiable_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: a graph starts at the module's output (or its first), and not before."""
    if not torch.is_grad_enabled():
        return output
    if isinstance(output, tuple):
        return (_leaf(output[0]), *output[1:])
    return _leaf(output)


def _leaf(value: Tensor, requires_grad: bool = True) -> Tensor:
    return value.detach().requires_grad_(requires_grad)

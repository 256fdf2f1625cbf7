"""Hands out x and dy of every scored layer while the backward pass runs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gradsafe.models.compat import hooks_inside_checkpoint
from gradsafe.models.inspection import base_model
from gradsafe.models.layers import Layers, LinearLayer
from gradsafe.models.modes import checkpointing_modules, decoder_loop, evaluating, frozen

Consume = Callable[[LinearLayer, Tensor, Tensor], None]


@contextmanager
def capture(model: nn.Module, layers: Layers, consume: Consume) -> Iterator[None]:
    """Call `consume` for every scored layer during each `loss.backward()` inside the context.

    The weights are frozen, so no weight gradient exists; the weight gradient of sample b is
    `dy[b].T @ x[b]`, `[O, I]`. The graph starts in the first scored block: blocks below run
    forward only. The model is in eval mode (dropout off); activation checkpointing stays active.
    All flags are restored at the end, also after an exception, and existing `.grad` are untouched.

    Args:
        model: The model that runs, PEFT wrapper or not.
        layers: From `find_layers(model)`.
        consume: `consume(layer, x, dy)` with `x [B, T, I]` the layer's input and `dy [B, T, O]` the
            gradient of its output, same device and dtype (x follows dy). Called once per layer, the
            last block first. The tensors may be non-contiguous, must not be modified, and are
            freed after the call unless it keeps them. Exceptions leave `backward()`.

    Yields:
        None. Run forward and backward in turns inside the context.

    Raises:
        ValueError: `layers` is empty or belongs to another model.
        RuntimeError: In the forward pass, a layer runs twice or has an unusable shape; at the next
            forward pass or the end, a backward pass reached only some of the layers.
    """
    if not layers.scored:
        raise ValueError("gradsafe.capture: layers.scored is empty; nothing to capture")
    loop = decoder_loop(model, layers.blocks)
    start = min(layer.block for layer in layers.scored)
    checkpointed = checkpointing_modules(model, layers.blocks, start)
    session = _Session(layers, consume)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(evaluating(model, checkpointed))
        for handle in session.register(model):
            stack.callback(handle.remove)
        cuts = {0, start}
        inside = any(map(hooks_inside_checkpoint, checkpointed))
        if inside and start > 0:
            cuts = {0}  # and one in front of the checkpoint
            before = layers.blocks[start - 1]
            stack.callback(before.register_forward_hook(_differentiable_output).remove)
        elif inside or loop in checkpointed:
            # Here a cut lies inside the checkpoint, and the reentrant kind needs an unbroken chain
            # of inputs that require grad, from the embedding up to the first scored block.
            cuts = {start}
            stack.callback(_differentiable_embedding(model).remove)
        for index in cuts:
            cut = _Cut(requires_grad=bool(checkpointed) and index == start)
            block = layers.blocks[index]
            stack.callback(block.register_forward_pre_hook(cut, with_kwargs=True).remove)
        yield
        session.check()


class _Session:
    """State of one capture: what ran in this forward pass, what the backward pass reached."""

    def __init__(self, layers: Layers, consume: Consume) -> None:
        self.layers = layers
        self.consume = consume
        # Makes tapped outputs differentiable although neither weights nor inputs are, so that the
        # gradient of the first scored block's input is never computed.
        self.anchor = torch.empty(0, requires_grad=True)
        self.ran: set[str] | None = None  # None outside the model's forward, as when recomputing
        self.reached: set[str] = set()
        self.interrupted = False
        self.shape: tuple[int, int] | None = None  # [B, T] of the hidden states of this block

    def register(self, model: nn.Module) -> Iterator[Any]:
        """Register the hooks that observe; yields their handles."""
        yield model.register_forward_pre_hook(self._begin)
        yield model.register_forward_hook(self._end, always_call=True)
        scored = {id(layer.module) for layer in self.layers.scored}
        for index in sorted({layer.block for layer in self.layers.scored}):
            block = self.layers.blocks[index]
            # Children too: a recomputation enters the block behind its own hooks.
            for module in [block, *block.children()]:
                if id(module) not in scored:
                    yield module.register_forward_pre_hook(self._note_shape, with_kwargs=True)
        for layer in self.layers.scored:
            yield layer.module.register_forward_hook(self._tap(layer), with_kwargs=True)

    def check(self) -> None:
        """Raise if the last backward pass reached some layers and missed others."""
        missed = [layer.name for layer in self.layers.scored if layer.name not in self.reached]
        if self.reached and missed and not self.interrupted:
            raise RuntimeError(
                f"gradsafe.capture: the backward pass reached {len(self.reached)} of "
                f"{len(self.layers.scored)} layers; {missed[0]} took no part in the loss "
                f"(and {len(missed) - 1} more); leave such layers out of layers.scored"
            )

    def deliver(self, layer: LinearLayer, x: Tensor, dy: Tensor, shape: tuple[int, int]) -> None:
        """Pass one layer's pair to the consumer."""
        self.interrupted = True
        self.consume(
            layer,
            x.to(device=dy.device, dtype=dy.dtype).reshape(*shape, layer.in_features),
            dy.reshape(*shape, layer.out_features),
        )
        self.interrupted = False
        self.reached.add(layer.name)

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.check()
        self.reached.clear()
        self.interrupted = False
        self.ran = set()

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.ran = None

    def _note_shape(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args[:1], kwargs.get("hidden_states")):
            if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
                self.shape = (value.shape[0], value.shape[1])
                return

    def _tap(self, layer: LinearLayer) -> Callable[..., Tensor]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Tensor:
            if self.ran is not None:
                if layer.name in self.ran:
                    raise RuntimeError(
                        f"gradsafe.capture: {layer.name} ran twice in one forward pass; layers "
                        f"shared between places are not supported, leave it out of layers.scored"
                    )
                self.ran.add(layer.name)
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is None or not isinstance(output, Tensor):
                raise RuntimeError(
                    f"gradsafe.capture: expected {layer.name} ({type(module).__name__}) to map a "
                    f"tensor to a tensor; leave it out of layers.scored"
                )
            shape = self._batch_shape(layer, x, output)
            return _Tap.apply(output, x.detach(), self.anchor, layer, self, shape)

        return hook

    def _batch_shape(self, layer: LinearLayer, x: Tensor, output: Tensor) -> tuple[int, int]:
        """Return [B, T]; accepts activations flattened to `[B * T, I]` in that order."""
        if x.ndim == 3 and self.shape in (None, tuple(x.shape[:2])):
            return x.shape[0], x.shape[1]
        if x.ndim == 2 and self.shape is not None and len(x) == self.shape[0] * self.shape[1]:
            return self.shape
        raise RuntimeError(
            f"gradsafe.capture: expected the input of {layer.name} to be [B, T, I] or [B * T, I] "
            f"with [B, T] = {list(self.shape or ())}, got {list(x.shape)} -> {list(output.shape)}; "
            f"layers that see only some tokens (experts) are not supported, leave it out of "
            f"layers.scored"
        )


class _Cut:
    """Forward pre-hook that detaches a block's hidden states: no graph below this block."""

    def __init__(self, *, requires_grad: bool) -> None:
        # Reentrant checkpointing builds no graph unless an input of the block requires grad.
        self.requires_grad = requires_grad

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not torch.is_grad_enabled():
            return None
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


class _Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward hands out the layer's x and dy.

    x is a saved tensor, not a closure, so activation checkpointing drops and recomputes it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        anchor: Tensor,
        layer: LinearLayer,
        session: _Session,
        shape: tuple[int, int],
    ) -> Tensor:
        """Save x; the result aliases `output` but is no view of it, so models may write to it."""
        ctx.save_for_backward(x)
        ctx.layer, ctx.session, ctx.shape = layer, session, shape
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:  # type: ignore[override]
        """Deliver x and dy, then pass dy on."""
        (x,) = ctx.saved_tensors
        ctx.session.deliver(ctx.layer, x, dy, ctx.shape)
        return dy if ctx.needs_input_grad[0] else None, None, None, None, None, None


def _differentiable_embedding(model: nn.Module) -> Any:
    """Make the embedding's output require grad, for cuts that lie inside a checkpoint."""
    base: Any = base_model(model)
    return base.get_input_embeddings().register_forward_hook(_differentiable_output)


def _differentiable_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: a graph starts at the module's output (or its first), and not before."""
    if not torch.is_grad_enabled():
        return output
    if isinstance(output, tuple):
        return (output[0].detach().requires_grad_(True), *output[1:])
    return output.detach().requires_grad_(True)

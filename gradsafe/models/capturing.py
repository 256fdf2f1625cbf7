"""Hands out x and dy of every scored layer while the backward pass runs, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gradsafe.models.calls import Part, merge, merge_stack
from gradsafe.models.candidates import LinearLayer
from gradsafe.models.cut import start_graph
from gradsafe.models.experts import Routing, replaced_experts
from gradsafe.models.layers import Layers
from gradsafe.models.modes import checkpointing_modules, decoder_loop, evaluating, frozen
from gradsafe.models.products import Product, watch_calls, watch_products
from gradsafe.models.threads import alone, own

# consume(layer, x, dy), with a Routing behind them for a layer with experts.
Consume = Callable[..., None]


@contextmanager
def capture(model: nn.Module, layers: Layers, consume: Consume) -> Iterator[None]:
    """Call `consume` for every scored layer during each `loss.backward()` inside the context.

    The weights are frozen, so no weight gradient exists; the weight gradient of sample b is
    `dy[b].T @ x[b]`, `[O, I]`. The graph starts in the first scored block: blocks below run
    forward only. The model is in eval mode (dropout off); activation checkpointing stays active.
    All flags are restored at the end, also after an exception, and existing `.grad` are untouched.
    Only passes of this thread are captured; another `capture` of the model waits for the end.

    Args:
        model: The model that runs, PEFT wrapper or not.
        layers: From `find_layers(model)`.
        consume: `consume(layer, x, dy)` with `x [B, T, I]` the layer's input and `dy [B, T, O]` the
            gradient of its output, same device and dtype (x follows dy). Where a layer sees several
            rows per token, or runs several times, these lie side by side: `[B, T * n, I]`. Where
            `layer.layout.time` is None the rows are no tokens. A layer with experts is called as
            `consume(layer, x, dy, routing)` with `x [N, I]`, `dy [N, O]` and their `Routing`.
            Called once per layer, the last block first. The tensors may be non-contiguous, must
            not be modified, and are freed after the call unless it keeps them. Exceptions leave
            `backward()`.

    Yields:
        None. Run forward and backward in turns inside the context.

    Raises:
        ValueError: `layers` is empty or belongs to another model.
        RuntimeError: In the forward pass, a layer has another shape than `find_layers` saw, or
            needs a batch of one sample (`layers.one_at_a_time`); at the next forward pass or the
            end, a backward pass reached only some of the layers.
    """
    if not layers.scored:
        raise ValueError("gradsafe.capture: layers.scored is empty; nothing to capture")
    decoder_loop(model, layers.blocks)  # raises where the layers belong to another model
    start = min(layer.block for layer in layers.scored)
    checkpointed = checkpointing_modules(model, layers.blocks, start)
    session = _Session(layers, consume)
    with ExitStack() as stack:
        stack.enter_context(alone(model))
        stack.enter_context(frozen(model))
        stack.enter_context(evaluating(model, checkpointed))
        for handle in session.register(model):
            stack.callback(handle.remove)
        routed = [layer for layer in layers.scored if layer.use == "experts"]
        stack.enter_context(replaced_experts(routed, session.routed))
        for handle in start_graph(
            model, layers.blocks, start, checkpointed, lambda: session.running
        ):
            stack.callback(handle.remove)
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
        self.running = False  # inside the model's forward, and not recomputing
        self.calls: Counter[str] = Counter()  # of each layer in the last forward pass
        self.waiting: dict[str, list[Part]] = {}  # parts of layers that ran several times
        self.reached: set[str] = set()
        self.interrupted = False
        self.shape: tuple[int, int] = (0, 0)  # [B, T] of the batch; zeros where unknown

    def register(self, model: nn.Module) -> Iterator[Any]:
        """Register the hooks that observe; yields their handles."""
        yield model.register_forward_pre_hook(own(self._begin), with_kwargs=True)
        yield model.register_forward_hook(own(self._end), always_call=True)
        scored = {id(layer.module) for layer in self.layers.scored}
        for index in sorted({layer.block for layer in self.layers.scored}):
            block = self.layers.blocks[index]
            # Children too: a recomputation enters the block behind its own hooks.
            for module in [block, *block.children()]:
                if id(module) not in scored:
                    yield module.register_forward_pre_hook(own(self._note_shape), with_kwargs=True)
        called = [layer for layer in self.layers.scored if layer.use == "call"]
        yield from watch_calls(called, self._called)
        multiplied = [layer for layer in self.layers.scored if layer.use == "product"]
        yield from watch_products(multiplied, self._multiplied)

    def check(self) -> None:
        """Finish a backward pass; raise if it reached some layers and missed others."""
        if self.interrupted:
            self.waiting.clear()
            return
        for name in list(self.waiting):  # calls that lie below the graph never arrive
            self._finish(name)
        missed = [layer.name for layer in self.layers.scored if layer.name not in self.reached]
        if self.reached and missed:
            raise RuntimeError(
                f"gradsafe.capture: the backward pass reached {len(self.reached)} of "
                f"{len(self.layers.scored)} layers; {missed[0]} took no part in the loss "
                f"(and {len(missed) - 1} more); leave such layers out of layers.scored"
            )

    def deliver(self, part: Part) -> None:
        """Take x and dy of one call; the consumer gets them when all calls have arrived."""
        name = part.layer.name
        parts = self.waiting.setdefault(name, [])
        parts.append(part)
        if len(parts) >= self.calls[name]:
            del part
            self._finish(name)

    def _finish(self, name: str) -> None:
        parts = self.waiting.pop(name)
        layer = parts[0].layer
        self.interrupted = True
        self.consume(layer, *(merge_stack(parts) if layer.experts else merge(parts)))
        self.interrupted = False
        self.reached.add(name)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.check()
        self.reached.clear()
        self.interrupted = False
        self.running = True
        self.calls.clear()
        inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        batch = next((value for value in inputs if isinstance(value, Tensor)), None)
        if batch is None or batch.ndim < 2:
            self.shape = (0, 0)
        else:
            self.shape = (batch.shape[0], batch.shape[1])

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.running = False

    def _note_shape(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.running:  # known from the batch
            return
        for value in (*args[:1], kwargs.get("hidden_states")):
            if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
                self.shape = (value.shape[0], value.shape[1])
                return

    def _called(
        self, layer: LinearLayer, module: nn.Module, x: Tensor | None, output: Any
    ) -> Tensor:
        if x is None or not isinstance(output, Tensor):
            raise RuntimeError(
                f"gradsafe.capture: expected {layer.name} ({type(module).__name__}) to map a "
                f"tensor to a tensor; leave it out of layers.scored"
            )
        return self._dense(layer, x, output)

    def _dense(self, layer: LinearLayer, x: Tensor, output: Tensor) -> Tensor:
        samples, width = self.shape
        try:
            if layer.layout is None or samples == 0:
                raise ValueError
            rows = layer.layout.rows(x, samples).shape[1]
            if layer.layout.time is not None and rows % width:
                raise ValueError
        except ValueError:
            raise RuntimeError(
                f"gradsafe.capture: expected the input of {layer.name} to hold [B, T] = "
                f"{[samples, width]} as {layer.layout}, got {list(x.shape)} -> "
                f"{list(output.shape)}; layers that see only some tokens are not supported, leave "
                f"it out of layers.scored"
            ) from None
        return self._tap(layer, x, output, None)

    def _tap(
        self, layer: LinearLayer, x: Tensor, output: Tensor, routing: Routing | None
    ) -> Tensor:
        if self.running:
            self.calls[layer.name] += 1
        return _Tap.apply(output, x.detach(), self.anchor, layer, self, routing)

    def _multiplied(
        self, layer: LinearLayer, product: Product | None, x: Tensor, output: Tensor
    ) -> Tensor:
        """One product with a bare weight, or with a part of a stack."""
        expected = (max(1, layer.experts), layer.out_features, layer.in_features)
        if (
            product is None
            or (product.stack, product.out_features, product.in_features) != expected
        ):
            raise RuntimeError(
                f"gradsafe.capture: {layer.name} is used in another way than find_layers saw; "
                f"leave it out of layers.scored"
            )
        if not layer.experts:
            return self._dense(layer, x, output)
        samples, width = self.shape
        numbers = torch.arange(product.first, product.first + product.matrices, device=x.device)
        per_matrix = x.shape[-3 if product.matrices > 1 else 0 : -1].numel() // product.matrices
        tokens = None
        if layer.layout is not None:
            flat = torch.arange(samples * width, device=x.device).view(samples, width, 1)
            tokens = layer.layout.tokens(flat, x.shape[product.matrices > 1 : -1])
            tokens = tokens.repeat(product.matrices)
        elif samples != 1:
            raise RuntimeError(
                f"gradsafe.capture: rows of {layer.name} cannot be told apart in a batch of "
                f"{samples} samples; pass one sample at a time"
            )
        experts = numbers.repeat_interleave(per_matrix)
        return self._tap(layer, x, output, Routing(tokens, experts, samples, width))

    def routed(
        self,
        layer: LinearLayer,
        output: Tensor,
        x: Tensor,
        tokens: Tensor,
        experts: Tensor,
        total: int,
    ) -> Tensor:
        """One product with fused experts."""
        samples, width = self.shape
        if total != samples * width:
            raise RuntimeError(
                f"gradsafe.capture: expected the experts of {layer.name} to see [B, T] = "
                f"{[samples, width]} tokens, got {total}; leave it out of layers.scored"
            )
        return self._tap(layer, x, output, Routing(tokens, experts, samples, width))


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
        routing: Routing | None,
    ) -> Tensor:
        """Save x; the result aliases `output` but is no view of it, so models may write to it."""
        ctx.save_for_backward(x)
        ctx.call = layer, session, session.shape, routing
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Deliver x and dy, then pass dy on."""
        (x,), (layer, session, shape, routing) = ctx.saved_tensors, ctx.call
        session.deliver(Part(layer, x, dy, shape, routing))
        return (dy if ctx.needs_input_grad[0] else None, *[None] * 5)

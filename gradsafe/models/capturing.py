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
from gradsafe.models.compat import hooks_inside_checkpoint
from gradsafe.models.cut import Cut, differentiable_embedding, differentiable_output
from gradsafe.models.experts import Routing, Tap, replaced_experts
from gradsafe.models.layers import Layers, LinearLayer
from gradsafe.models.modes import checkpointing_modules, decoder_loop, evaluating, frozen
from gradsafe.models.products import Product, watch

# consume(layer, x, dy), and a Routing behind them for a layer with experts.
Consume = Callable[..., None]


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
    loop = decoder_loop(model, layers.blocks)
    start = min(layer.block for layer in layers.scored)
    checkpointed = checkpointing_modules(model, layers.blocks, start)
    session = _Session(layers, consume)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(evaluating(model, checkpointed))
        for handle in session.register(model):
            stack.callback(handle.remove)
        stack.enter_context(replaced_experts(session.expert_taps()))
        cuts = {0, start}
        inside = any(map(hooks_inside_checkpoint, checkpointed))
        if inside and len({id(block) for block in layers.blocks}) < len(layers.blocks):
            raise RuntimeError(
                "gradsafe.capture: this version of transformers runs hooks within activation "
                "checkpoints, where a block that stands at two places cannot be followed; switch "
                "checkpointing off, or update transformers"
            )
        if inside and start > 0:
            cuts = {0}  # and one in front of the checkpoint
            before = layers.blocks[start - 1]
            stack.callback(before.register_forward_hook(differentiable_output).remove)
        elif inside or loop in checkpointed:
            # Here a cut lies inside the checkpoint, and the reentrant kind needs an unbroken chain
            # of inputs that require grad, from the embedding up to the first scored block.
            cuts = {start}
            stack.callback(differentiable_embedding(model).remove)
        for index in cuts:
            cut = Cut(lambda: session.running, requires_grad=bool(checkpointed) and index == start)
            block = layers.blocks[index]
            stack.callback(model.register_forward_pre_hook(cut.begin).remove)
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
        self.running = False  # inside the model's forward, and not recomputing
        self.calls: Counter[str] = Counter()  # of each layer in the last forward pass
        self.waiting: dict[str, list[Part]] = {}  # parts of layers that ran several times
        self.reached: set[str] = set()
        self.interrupted = False
        self.shape: tuple[int, int] | None = None  # [B, T] of the batch

    def register(self, model: nn.Module) -> Iterator[Any]:
        """Register the hooks that observe; yields their handles."""
        yield model.register_forward_pre_hook(self._begin, with_kwargs=True)
        yield model.register_forward_hook(self._end, always_call=True)
        scored = {id(layer.module) for layer in self.layers.scored}
        for index in sorted({layer.block for layer in self.layers.scored}):
            block = self.layers.blocks[index]
            # Children too: a recomputation enters the block behind its own hooks.
            for module in [block, *block.children()]:
                if id(module) not in scored:
                    yield module.register_forward_pre_hook(self._note_shape, with_kwargs=True)
        products = {layer.name: layer for layer in self.layers.scored if layer.use == "product"}
        for layer in self.layers.scored:
            if layer.use == "call":
                for module in (layer.module, *layer.twins):
                    yield module.register_forward_hook(self._called(layer), with_kwargs=True)

        def multiplied(name: str, product: Product | None, x: Tensor, output: Tensor) -> Tensor:
            return self._multiplied(products[name], product, x, output)

        weights = [
            (layer.name, layer.module, layer.parameter, layer.around or layer.module)
            for layer in products.values()
        ]
        yield from watch(weights, multiplied)

    def expert_taps(self) -> list[tuple[nn.Module, Tap]]:
        """Experts modules, each with what sees its products."""
        owners: dict[int, tuple[nn.Module, dict[str, LinearLayer]]] = {}
        for layer in self.layers.scored:
            if layer.use == "experts":
                _, members = owners.setdefault(id(layer.module), (layer.module, {}))
                members[layer.parameter] = layer
        return [(module, self._routed(members)) for module, members in owners.values()]

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
        """Take x and dy of one call; the consumer gets them when all calls are there."""
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
        if layer.experts:
            self.consume(layer, *merge_stack(parts))
        else:
            self.consume(layer, *merge(parts))
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
        self.shape = None if batch is None or batch.ndim < 2 else (batch.shape[0], batch.shape[1])

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.running = False

    def _note_shape(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.running:  # the batch said it
            return
        for value in (*args[:1], kwargs.get("hidden_states")):
            if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
                self.shape = (value.shape[0], value.shape[1])
                return

    def _count(self, layer: LinearLayer) -> None:
        if self.running:
            self.calls[layer.name] += 1

    def _called(self, layer: LinearLayer) -> Callable[..., Tensor]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Tensor:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is None or not isinstance(output, Tensor):
                raise RuntimeError(
                    f"gradsafe.capture: expected {layer.name} ({type(module).__name__}) to map a "
                    f"tensor to a tensor; leave it out of layers.scored"
                )
            return self._dense(layer, x, output)

        return hook

    def _dense(self, layer: LinearLayer, x: Tensor, output: Tensor) -> Tensor:
        self._count(layer)
        shape = self._check_shape(layer, x, output)
        return _Tap.apply(output, x.detach(), self.anchor, layer, self, shape, None)

    def _check_shape(self, layer: LinearLayer, x: Tensor, output: Tensor) -> tuple[int, int]:
        """Return [B, T], after a look whether x has the layer's layout."""
        layout = layer.layout
        samples, width = self.shape or (0, 0)
        try:
            if layout is None or samples == 0:
                raise ValueError
            rows = layout.rows(x, samples).shape[1]
            if layout.time is not None and rows % width:
                raise ValueError
        except ValueError:
            raise RuntimeError(
                f"gradsafe.capture: expected the input of {layer.name} to hold [B, T] = "
                f"{[samples, width]} as {layout}, got {list(x.shape)} -> {list(output.shape)}; "
                f"layers that see only some tokens are not supported, leave it out of layers.scored"
            ) from None
        return samples, width

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
        self._count(layer)
        samples, width = self.shape or (0, 0)
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
        routing = Routing(tokens, numbers.repeat_interleave(per_matrix), samples, width)
        return _Tap.apply(output, x.detach(), self.anchor, layer, self, (samples, width), routing)

    def _routed(self, members: dict[str, LinearLayer]) -> Tap:
        def tap(
            name: str, output: Tensor, x: Tensor, tokens: Tensor, experts: Tensor, total: int
        ) -> Tensor:
            if name not in members:
                return output
            layer, shape = members[name], self.shape or (0, 0)
            if total != shape[0] * shape[1]:
                raise RuntimeError(
                    f"gradsafe.capture: expected the experts of {layer.name} to see [B, T] = "
                    f"{list(shape)} tokens, got {total}; leave it out of layers.scored"
                )
            self._count(layer)
            routing = Routing(tokens, experts, *shape)
            return _Tap.apply(output, x.detach(), self.anchor, layer, self, shape, routing)

        return tap


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
        routing: Routing | None,
    ) -> Tensor:
        """Save x; the result aliases `output` but is no view of it, so models may write to it."""
        ctx.save_for_backward(x)
        ctx.layer, ctx.session, ctx.shape, ctx.routing = layer, session, shape, routing
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Deliver x and dy, then pass dy on."""
        (x,) = ctx.saved_tensors
        ctx.session.deliver(Part(ctx.layer, x, dy, ctx.shape, ctx.routing))
        return (dy if ctx.needs_input_grad[0] else None, *[None] * 6)

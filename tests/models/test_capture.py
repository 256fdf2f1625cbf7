from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from gradsafe.models import (
    Encoded,
    Layers,
    LinearLayer,
    capture,
    collate,
    find_layers,
    response_nll,
)
from gradsafe.models.compat import hooks_inside_checkpoint

Build = Callable[..., nn.Module]
Gradients = dict[str, Tensor]
Switch = Callable[[nn.Module, bool], None]


def captured(
    model: nn.Module,
    items: list[Encoded],
    side: Any = "right",
    layers: Layers | None = None,
) -> Gradients:
    """Weight gradient of every sample, `[B, O, I]` per layer name, from captured x and dy."""
    found: Gradients = {}

    def consume(layer: LinearLayer, x: Tensor, dy: Tensor) -> None:
        assert layer.name not in found
        assert x.dtype == dy.dtype
        assert x.shape[:2] == dy.shape[:2]
        assert not x.requires_grad
        found[layer.name] = torch.einsum("bto,bti->boi", dy, x)

    layers = layers or find_layers(model)
    with capture(model, layers, consume):
        response_nll(model, collate(items, 0, side)).sum().backward()
    assert set(found) == {layer.name for layer in layers.scored}
    return found


def plain(model: nn.Module, item: Encoded) -> Gradients:
    """Weight gradients of one prompt alone, from autograd."""
    layers = find_layers(model).scored
    weights = [getattr(layer.module, "base_layer", layer.module).weight for layer in layers]
    flags = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    loss = response_nll(model.eval(), collate([item], 0)).sum()
    gradients = torch.autograd.grad(loss, weights)
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    return {
        layer.name: g.T if isinstance(layer.module, Conv1D) else g
        for layer, g in zip(layers, gradients, strict=True)
    }


def assert_same(found: Gradients, expected: list[Gradients], rtol: float) -> None:
    """Every sample of every layer, relative to that gradient's norm."""
    for name, value in found.items():
        for row, gradients in enumerate(expected):
            error = (value[row] - gradients[name]).norm() / gradients[name].norm()
            assert error <= rtol, f"{name}[{row}]: relative error {error:.2e}"


@pytest.mark.parametrize("side", ["right", "left"])
def test_sample_gradients_equal_autograd(
    build_model: Build, family: str, items: list[Encoded], side: str, true_float64: None
) -> None:
    model = build_model(family, torch.float64)
    expected = [plain(model, item) for item in items]
    assert_same(captured(model, items, side), expected, 1e-10)
    order = [3, 0, 4, 2, 1]
    permuted = captured(model, [items[i] for i in order], side)
    assert_same(permuted, [expected[i] for i in order], 1e-10)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batching_does_not_matter_in_float32(
    build_model: Build, family: str, items: list[Encoded], side: str
) -> None:
    model = build_model(family)
    alone = [{name: g[0] for name, g in captured(model, [item]).items()} for item in items]
    assert_same(captured(model, items, side), alone, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("count", [None, 2])
def test_gradient_checkpointing(
    build_model: Build,
    checkpoint_blocks: Switch,
    family: str,
    items: list[Encoded],
    reentrant: bool,
    count: int | None,
) -> None:
    dropout = {"dropout": 0.0} if family == "opt" else {}
    model = build_model(family, **dropout)
    layers = find_layers(model, layers=count)
    expected = captured(model, items, layers=layers)
    checkpoint_blocks(model, reentrant)
    for training in (True, False):
        model.train(training)
        calls: list[int] = []
        norm = next(m for m in layers.blocks[-1].modules() if "Norm" in type(m).__name__)
        handle = norm.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        assert_same(
            captured(model, items, layers=layers),
            [{name: g[i] for name, g in expected.items()} for i in range(len(items))],
            1e-6,
        )
        handle.remove()
        assert len(calls) == 2, "the block was not recomputed: checkpointing was off"
        assert model.training is training


def test_checkpointing_that_would_switch_dropout_on(
    build_model: Build, checkpoint_blocks: Switch, items: list[Encoded]
) -> None:
    model = build_model("opt", dropout=0.5)
    expected = captured(model, items)
    checkpoint_blocks(model, False)
    model.train()
    with pytest.warns(UserWarning, match=r"checkpointing is off .*OPTDecoder.* dropout=0\.5"):
        found = captured(model, items)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


class LoopedDecoder(nn.Module):
    """A decoder of the older kind, which checkpoints whole block calls from its own loop."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=3)
        self.embedding = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 64)
        self.gradient_checkpointing = False
        self.reentrant = reentrant

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False
    ) -> tuple[Tensor]:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(block.__call__, hidden, use_reentrant=self.reentrant)
            else:
                hidden = block(hidden)
        return (self.head(hidden),)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("count", [None, 1])
def test_checkpointing_from_the_decoders_loop(
    items: list[Encoded], reentrant: bool, count: int | None
) -> None:
    model = LoopedDecoder(reentrant)
    layers = find_layers(model, layers=count)
    expected = captured(model, items, layers=layers)
    model.gradient_checkpointing = True
    found = captured(model, items, layers=layers)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("adapters", [["q_proj", "down_proj"], "all-linear"])
def test_lora_gives_the_gradient_of_the_effective_weight(
    build_model: Build, items: list[Encoded], adapters: Any, true_float64: None
) -> None:
    config = LoraConfig(r=2, target_modules=adapters, init_lora_weights=False, lora_dropout=0.3)
    model = get_peft_model(build_model("llama", torch.float64), config).double()
    expected = [plain(model, item) for item in items]
    model.train()
    assert_same(captured(model, items), expected, 1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_with_checkpointing(
    build_model: Build, checkpoint_blocks: Switch, items: list[Encoded], reentrant: bool
) -> None:
    model = build_model("llama")
    model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False))
    expected = captured(model, items)
    checkpoint_blocks(model, reentrant)
    model.train()
    for name, gradient in captured(model, items).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_bfloat16(build_model: Build, family: str, items: list[Encoded]) -> None:
    model = build_model(family, torch.bfloat16)
    found = captured(model, items)
    exact = captured(model.float(), items)
    for name, gradient in found.items():
        assert gradient.dtype == torch.bfloat16
        error = (gradient.float() - exact[name]).norm() / exact[name].norm()
        assert error < 0.1, name


def test_autocast_gives_equal_dtypes(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found = captured(model, items)
    assert {gradient.dtype for gradient in found.values()} == {torch.bfloat16}


def test_one_token_prompts(build_model: Build) -> None:
    # Attention over a single token does not depend on queries and keys: their gradient is zero.
    items = [Encoded([5, 6], 1), Encoded([7, 8, 9, 10], 3)]
    model = build_model("llama")
    for name, gradient in captured(model, items, "left").items():
        assert torch.isfinite(gradient).all()
        if "q_proj" in name or "k_proj" in name:
            assert gradient[0].norm() < 1e-5 * gradient[1].norm()
        else:
            assert gradient[0].norm() > 0


def test_last_block_first(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama")
    order: list[int] = []
    with capture(model, find_layers(model), lambda layer, x, dy: order.append(layer.block)):
        response_nll(model, collate(items, 0)).sum().backward()
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_backward_stops_at_the_first_scored_block(
    build_model: Build, checkpoint_blocks: Switch, items: list[Encoded], checkpointing: bool | None
) -> None:
    model = build_model("llama")
    if checkpointing is not None:
        # This also makes the embedding's output require grad.
        checkpoint_blocks(model, checkpointing)
    grads: dict[int, bool] = {}

    def note(index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        grads[index] = hidden.requires_grad

    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda m, args, out, i=index: note(i, out))
    names = captured(model, items, layers=find_layers(model, layers=1))
    assert grads == {0: False, 1: False, 2: True}
    assert all(name.startswith("model.layers.2.") for name in names)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Asserts that flags, gradients and hooks of a model are the same afterwards."""

    def state() -> list[Any]:
        flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        modules = [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ]
        return [flags, modules]

    before = state()
    kept = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    yield
    assert state() == before
    for parameter, gradient, value in kept:
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)


def mixed_state(model: nn.Module) -> None:
    model.train()
    model.model.layers[1].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
        if index % 4 == 0:
            parameter.grad = torch.full_like(parameter, index)


class Stop(Exception):
    pass


def test_everything_is_restored(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama")
    mixed_state(model)
    with unchanged(model):
        captured(model, items)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_everything_is_restored_after_an_exception(
    build_model: Build, checkpoint_blocks: Switch, items: list[Encoded], reentrant: bool | None
) -> None:
    model = build_model("llama")
    if reentrant is not None:
        checkpoint_blocks(model, reentrant)
    mixed_state(model)
    calls = 0

    def consume(layer: LinearLayer, x: Tensor, dy: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop

    with unchanged(model):
        with pytest.raises(Stop), capture(model, find_layers(model), consume):
            response_nll(model, collate(items, 0)).sum().backward()
        with pytest.raises(Stop), capture(model, find_layers(model), consume):
            raise Stop
        # Caught inside: the context goes on with the next batch.
        calls = 0
        with capture(model, find_layers(model), consume):
            with pytest.raises(Stop):
                response_nll(model, collate(items, 0)).sum().backward()
            response_nll(model, collate(items, 0)).sum().backward()
    assert calls == 3 + 21


def test_no_weight_gradient_and_no_dropout_inside(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama", attention_dropout=0.5).train()
    with capture(model, find_layers(model), lambda *_: None):
        assert not any(p.requires_grad for p in model.parameters())
        first, second = (response_nll(model, collate(items, 0)) for _ in range(2))
        assert torch.equal(first, second)
        first.sum().backward()
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_memory_is_freed_after_each_call(
    build_model: Build, checkpoint_blocks: Switch, items: list[Encoded], reentrant: bool | None
) -> None:
    model = build_model("llama")
    if reentrant is not None:
        checkpoint_blocks(model, reentrant)
    objects: list[weakref.ref[Tensor]] = []
    storages: dict[int, list[StorageWeakRef]] = {}

    def consume(layer: LinearLayer, x: Tensor, dy: Tensor) -> None:
        assert all(reference() is None for reference in objects)
        # Everything of the blocks above is gone, in memory and not only as objects.
        above = [s for block, held in storages.items() if block > layer.block for s in held]
        # The gradient that flows down the residual stream is shared by neighbouring blocks.
        assert sum(not s.expired() for s in above) <= 1
        objects.extend([weakref.ref(x), weakref.ref(dy)])
        held = storages.setdefault(layer.block, [])
        held.extend(StorageWeakRef(t.untyped_storage()) for t in (x, dy))

    with capture(model, find_layers(model), consume):
        response_nll(model, collate(items, 0)).sum().backward()
    assert len(objects) == 42
    assert all(reference() is None for reference in objects)
    assert all(s.expired() for held in storages.values() for s in held)


def test_several_batches_in_one_context(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama")
    calls: list[str] = []
    with capture(model, find_layers(model), lambda layer, x, dy: calls.append(layer.name)):
        for item in items:
            response_nll(model, collate([item], 0)).sum().backward()
        with torch.no_grad():
            response_nll(model, collate(items, 0))
    assert len(calls) == 21 * len(items)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_calls_of_a_shared_layer_add_up(
    build_model: Build, checkpoint_blocks: Switch, items: list[Encoded], reentrant: bool | None
) -> None:
    model = build_model("llama")
    model.model.layers[2] = model.model.layers[0]
    layers = find_layers(model)
    assert {layer.block for layer in layers.scored} == {0, 1}
    expected = [plain(model, item) for item in items]
    if reentrant is not None:
        checkpoint_blocks(model, reentrant)
    if reentrant is not None and hooks_inside_checkpoint(model.model.layers[0]):
        with pytest.raises(RuntimeError, match="switch checkpointing off"):
            captured(model, items, layers=layers)
        return
    assert_same(captured(model, items, layers=layers), expected, 1e-5)


def test_calls_of_modules_with_a_tied_weight_add_up(
    build_model: Build, items: list[Encoded]
) -> None:
    model = build_model("llama")
    first, last = model.model.layers[0].mlp, model.model.layers[2].mlp
    last.up_proj.weight = first.up_proj.weight
    layers = find_layers(model)
    assert len(layers.scored) == 20
    assert_same(captured(model, items), [plain(model, item) for item in items], 1e-5)


class Wrapped(nn.Module):
    """Puts a function between an MLP and its block."""

    def __init__(self, inner: nn.Module, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.inner, x)


def test_a_layer_outside_the_loss_is_left_out(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama")
    layers = find_layers(model)
    block = model.model.layers[1]
    inner = block.mlp.forward
    block.mlp.forward = lambda x: inner(x).detach()
    with (
        pytest.raises(RuntimeError, match=r"reached 18 of 21 .*layers\.1\.mlp"),
        capture(model, layers, lambda *_: None),
    ):
        response_nll(model, collate(items, 0)).sum().backward()
    layers = find_layers(model)
    assert len(layers.scored) == 18
    assert "has no gradient (its output only chooses)" in {s.reason for s in layers.skipped}
    captured(model, items)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_flattened_activations(
    build_model: Build, checkpoint_blocks: Switch, items: list[Encoded], reentrant: bool | None
) -> None:
    model = build_model("llama")
    expected = captured(model, items)
    for block in model.model.layers:
        block.mlp = Wrapped(block.mlp, lambda inner, x: inner(x.flatten(0, 1)).view(x.shape))
    if reentrant is not None:
        checkpoint_blocks(model, reentrant)
    # Two forward passes of different shape, then both backward passes.
    shapes: list[tuple[int, ...]] = []
    with capture(model, find_layers(model), lambda layer, x, dy: shapes.append(x.shape[:2])):
        losses = [response_nll(model, collate(part, 0)) for part in (items[:2], items[2:])]
        for loss in losses:
            loss.sum().backward()
    assert shapes == [(2, 8)] * 21 + [(3, 12)] * 21
    for name, gradient in captured(model, items).items():
        before = expected[name.replace("mlp.inner.", "mlp.")]
        torch.testing.assert_close(gradient, before, rtol=1e-5, atol=1e-7)


def test_rows_that_are_no_tokens_are_left_out(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama")
    block = model.model.layers[1]
    block.mlp = Wrapped(block.mlp, lambda inner, x: x + inner(x.flatten(0, 1)[:5]).sum())
    layers = find_layers(model)
    assert not any("layers.1.mlp" in layer.name for layer in layers.scored)
    assert {s.reason for s in layers.skipped if ".inner." in s.name} == {
        "its input has no axis of samples"
    }


@pytest.mark.parametrize(
    ("to", "back"),
    [
        (lambda x: x[None], lambda y: y[0]),
        (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
        (lambda x: torch.stack([x, 2 * x], 2), lambda y: y.sum(2)),
        (lambda x: torch.stack([x, 2 * x], 1), lambda y: y.sum(1)),
    ],
)
def test_layouts_are_recognised(
    build_model: Build, items: list[Encoded], to: Callable[..., Any], back: Callable[..., Any]
) -> None:
    model = build_model("llama")
    for block in model.model.layers:
        block.mlp = Wrapped(block.mlp, lambda inner, x: back(inner(to(x))))
    # As many samples as tokens: the sizes alone would not tell the axes apart.
    square = [Encoded(list(range(3 + i, 8 + i)), 3) for i in range(5)]
    for batch in (items, square):
        assert_same(captured(model, batch), [plain(model, item) for item in batch], 1e-5)


def test_another_layout_than_was_seen_is_refused(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama")
    layers = find_layers(model)
    mlp = model.model.layers[1].mlp
    inner = mlp.forward
    mlp.forward = lambda x: x + inner(x.flatten(0, 1)[:5]).sum()
    with (
        pytest.raises(RuntimeError, match=r"layers\.1\.mlp.*\[B, T\].*leave it out"),
        capture(model, layers, lambda *_: None),
    ):
        response_nll(model, collate(items, 0))


def test_models_may_write_to_a_layers_output(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("qwen2")
    for block in model.model.layers:
        # Some families clamp their projections in place.
        block.self_attn.q_proj = nn.Sequential(block.self_attn.q_proj, InPlaceClamp())
    expected = [plain(model, item) for item in items]
    assert_same(captured(model, items), expected, 1e-5)


class InPlaceClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(-0.5, 0.5)


def test_offloaded_blocks(build_model: Build, items: list[Encoded], tmp_path: Path) -> None:
    model = build_model("llama")
    expected = captured(model, items)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places["model.rotary_emb"] = "cpu"
    model = dispatch_model(
        model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    flags = [p.requires_grad for p in model.parameters()]
    for name, gradient in captured(model, items).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_bad_layers(build_model: Build) -> None:
    model = build_model("llama")
    layers = find_layers(model)
    with pytest.raises(ValueError, match="layers do not belong"):
        capture(build_model("llama"), layers, lambda *_: None).__enter__()
    layers.scored.clear()
    with pytest.raises(ValueError, match=r"layers\.scored is empty"):
        capture(model, layers, lambda *_: None).__enter__()

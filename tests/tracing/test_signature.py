from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from builders import FAMILIES, VOCABULARY, make_model, true_float64
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from signature_oracle import relative_error, signature
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from gradsafe._fallback import FallbackWarning
from gradsafe.models import Encoded
from gradsafe.models.compat import cache_argument
from gradsafe.tracing import response_pass
from gradsafe.tracing.signature import (
    NonFiniteSignatureError,
    SignaturePass,
    resolve_layer,
    signatures,
)

ALL_LAYERS = [0, 1, 2, 3]


def expected(model: nn.Module, items: list[Encoded], layer: int) -> Tensor:
    return torch.stack([signature(model, item, layer) for item in items])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_the_full_backward_at_every_layer_whatever_the_batching(family, items):
    model = make_model(family).eval()
    together = signatures(model, items, ALL_LAYERS, 0)
    for layer in ALL_LAYERS:
        exact = expected(model, items, layer)
        alone = signatures(model, items, [layer], 0, batch_tokens=1)[layer]
        some = signatures(model, items, [layer], 0, batch_tokens=40)[layer]
        for found in (together[layer], alone, some):
            for row in range(len(items)):
                assert relative_error(found[row], exact[row]) < 1e-5, (layer, row)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_float64_agrees_to_float64(family, items):
    model = make_model(family, torch.float64).eval()
    for layer in (1, 3):
        with true_float64():
            found = signatures(model, items, [layer], 0)[layer]
        exact = expected(model, items, layer)
        assert found.dtype == torch.float64
        assert max(relative_error(f, e) for f, e in zip(found, exact, strict=True)) < 1e-11


def test_the_last_layer_is_the_closed_form(items):
    """g = W^T (softmax(W h) - onehot(y_1)) / R."""
    model = make_model("llama").eval()
    found = signatures(model, items, [3], 0)[3]
    half = found.shape[1] // 2
    weight = model.lm_head.weight.detach()
    for row, item in zip(found, items, strict=True):
        probabilities = torch.softmax(weight @ row[:half], 0)
        probabilities[item.input_ids[item.prompt_length]] -= 1
        closed = weight.T @ probabilities / item.response_length
        torch.testing.assert_close(row[half:], closed, rtol=1e-4, atol=1e-6)


def test_the_last_layer_reads_the_prompt_alone_and_computes_one_row_of_logits(items):
    model = make_model("llama").eval()
    seen: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    signatures(model, items[:1], [-1], 0)
    assert seen == [(1, items[0].prompt_length)]


def test_the_published_procedure_gives_the_same_signature(items):
    """Prompt-only forward for h; forward and full backward with labels for g, hook on the layer."""
    model = make_model("llama").eval()
    found = signatures(model, items, [-1], 0)[3]
    for row, item in zip(found, items, strict=True):
        prompt = torch.tensor([item.input_ids[: item.prompt_length]])
        with torch.no_grad():
            state = model(prompt, output_hidden_states=True).hidden_states[-1][0, -1]
        ids = torch.tensor([item.input_ids])
        labels = ids.clone()
        labels[:, : item.prompt_length] = -100
        output = model(ids, labels=labels, output_hidden_states=True)
        output.hidden_states[-1].retain_grad()
        output.loss.backward()
        gradient = output.hidden_states[-1].grad[0, item.prompt_length - 1 : -1][0]
        published = torch.cat([state, gradient])
        assert relative_error(row, published) < 1e-4
        assert functional.cosine_similarity(row, published, dim=0) > 1 - 1e-6


def test_weights_flags_and_gradients_stay_as_they_are(items):
    model = make_model("llama").train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    signatures(model, items, [1, 3], 0)
    assert model.training
    assert model.model.layers[0].training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (parameter is not model.lm_head.weight)
        assert torch.equal(parameter, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_it_works_without_grad_mode_and_in_bfloat16(items):
    model = make_model("llama").eval()
    exact = expected(model, items, 2)
    with torch.no_grad():
        found = signatures(model.bfloat16(), items, [2], 0)[2]
    assert found.dtype == torch.float32
    cosine = functional.cosine_similarity(found.double(), exact, dim=1)
    assert cosine.min() > 0.999


def test_a_llama_runs_its_responses_against_a_cache(items, monkeypatch):
    """On the oldest and on the newest transformers, by the name that they do not warn of."""
    monkeypatch.setenv("GRADSAFE_STRICT", "1")
    model = make_model("llama").eval()
    seen: list[tuple[int, set[str]]] = []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append((given["input_ids"].shape[1], set(given))),
        with_kwargs=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        signatures(model, items, [1], 0)
    prompt = max(item.prompt_length for item in items)
    response = max(item.response_length for item in items)
    assert [width for width, _ in seen] == [prompt - 1, response]
    declared = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in declared else "past_key_values"
    assert [name in given for _, given in seen] == [False, True]
    assert all(given <= set(declared) for _, given in seen)


@pytest.mark.parametrize("kind", ["no argument", "no cache"])
def test_without_a_cache_the_slower_path_is_announced_and_exact(kind, items, monkeypatch):
    model = make_model("llama").eval()
    parameters = response_pass.forward_parameters(model)
    name = cache_argument(parameters)
    if kind == "no argument":
        monkeypatch.setattr(response_pass, "forward_parameters", lambda m: parameters - {name})
    else:
        model.register_forward_hook(lambda module, args, output: setattr(output, name, None))
    monkeypatch.setattr("gradsafe._fallback._announced", set())
    with pytest.warns(FallbackWarning, match="whole sequences"):
        found = signatures(model, items, [1, 3], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        signatures(model, items, [1], 0)
    for layer in (1, 3):
        exact = expected(model, items, layer)
        assert max(map(relative_error, found[layer], exact)) < 1e-5
    monkeypatch.setenv("GRADSAFE_STRICT", "1")
    with pytest.raises(RuntimeError, match="GRADSAFE_STRICT"):
        signatures(model, items, [1], 0)


def test_recurrent_models_run_over_whole_sequences(items, monkeypatch):
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=0,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(config).eval()
    monkeypatch.setattr("gradsafe._fallback._announced", set())
    with pytest.warns(FallbackWarning, match="whole sequences"):
        found = signatures(model, items, [1, 3], 0)
    for layer in (1, 3):
        exact = expected(model, items, layer)
        assert max(map(relative_error, found[layer], exact)) < 1e-5


def test_the_graph_ends_at_the_layer(items):
    """Blocks below the layer, and the prompt's cache, take no part in the backward pass."""
    model = make_model("llama").eval()
    grad_modes: list[tuple[int, bool, bool]] = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda m, a, out, index=index: grad_modes.append(
                (index, torch.is_grad_enabled(), out.requires_grad)
            )
        )
    signatures(model, items, [2], 0)
    assert {(i, r) for i, enabled, r in grad_modes if enabled} == {
        (0, False),
        (1, False),
        (2, True),
    }
    assert not any(r for _, enabled, r in grad_modes if not enabled)


def test_layers_are_indices_into_hidden_states():
    model = make_model("llama")
    assert [resolve_layer(model, layer) for layer in ("last", -1, 3, 0, -4)] == [3, 3, 3, 0, 0]
    for layer in (4, -5):
        with pytest.raises(ValueError, match="out of range; the model has 3 blocks"):
            resolve_layer(model, layer)
    for layer in ("first", True, 1.0):
        with pytest.raises(TypeError, match="expected layer"):
            resolve_layer(model, layer)


def test_plans_hold_every_sample_once_and_keep_the_budget(items):
    model = make_model("llama")
    for layers in ([1], [3]):
        plan = SignaturePass(model, layers, 0).plan(items * 5, 60)
        assert sorted(i for batch in plan for i in batch) == list(range(len(items) * 5))
        assert len(plan) < len(items) * 5
        for batch in plan:
            members = [(items * 5)[i] for i in batch]
            width = max(m.prompt_length for m in members)
            if layers == [1]:
                width += max(m.response_length for m in members)
            assert len(batch) == 1 or len(batch) * width <= 60


def test_lora_adapters_count(items):
    base = make_model("llama").eval()
    plain = signatures(base, items, [1, 3], 0)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    found = signatures(model, items, [1, 3], 0)
    merged = model.merge_and_unload().eval()
    for layer in (1, 3):
        exact = expected(merged, items, layer)
        assert max(map(relative_error, found[layer], exact)) < 1e-4
        assert max(map(relative_error, plain[layer], exact)) > 1e-2


def test_prompt_learning_adapters_are_refused(items):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(make_model("llama"), config)
    with pytest.raises(ValueError, match="virtual tokens"):
        signatures(model, items, [1], 0)


def test_nan_is_named(items):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(NonFiniteSignatureError, match=r"signature of items\[\d\] holds NaN"):
        signatures(model, items, [-1], 0)


def test_nothing_to_do_is_refused(items):
    model = make_model("llama")
    for arguments in ((items, []), ([], [1])):
        with pytest.raises(ValueError, match="at least one item and one layer"):
            signatures(model, *arguments, 0)

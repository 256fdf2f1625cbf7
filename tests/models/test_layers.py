from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from gradsafe.models import find_layers

Build = Callable[..., nn.Module]
# Weights per block (attention, MLP): fused projections count as one.
EXPECTED = {
    "llama": (4, 3),
    "mistral": (4, 3),
    "qwen2": (4, 3),
    "qwen3": (4, 3),
    "gemma2": (4, 3),
    "gemma3": (4, 3),
    "phi3": (2, 2),
    "gpt2": (2, 2),
    "gpt_neox": (2, 2),
    "opt": (4, 2),
}


class PackedLinear(nn.Module):
    """A quantised layer as far as layer choice is concerned: sizes, packed weight, no Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max() / 127)
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def replace_linears(block: nn.Module) -> None:
    for module in list(block.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))


def test_every_family(build_model: Build, family: str) -> None:
    model = build_model(family)
    layers = find_layers(model)
    attention, mlp = EXPECTED[family]
    for block in range(3):
        roles = [layer.role for layer in layers.scored if layer.block == block]
        assert roles.count("attention") == attention
        assert roles.count("mlp") == mlp
    modules = dict(model.named_modules())
    for layer in layers.scored:
        assert modules[layer.name] is layer.module
        shape = (layer.out_features, layer.in_features)
        stored = tuple(layer.module.weight.shape)
        assert stored == (shape[::-1] if isinstance(layer.module, Conv1D) else shape)
    assert [layer.block for layer in layers.scored] == sorted(x.block for x in layers.scored)
    assert len(layers.blocks) == 3
    assert layers.head_dim == 8


def test_every_parameter_is_scored_or_has_a_reason(build_model: Build, family: str) -> None:
    model = build_model(family)
    for option in (None, 1):
        layers = find_layers(model, layers=option)
        assert layers.total_parameters == sum(p.numel() for p in model.parameters())
        assert 0 < layers.scored_parameters < layers.total_parameters
    reasons = {entry.reason for entry in find_layers(model).skipped}
    assert {"embedding", "norm"} <= reasons
    assert not any(reason.startswith("unsupported") for reason in reasons)


def test_summary_is_readable(build_model: Build) -> None:
    layers = find_layers(build_model("llama", tie_word_embeddings=False), layers=2)
    text = str(layers)
    assert text.startswith("scored 14 weights in 2 blocks: 15.4 k of 27.")
    assert "parameters (56 %); skipped: outside the chosen blocks 7.7 k" in text
    assert "output head 2.0 k" in text
    assert "norm" in text
    by_name = {entry.name: entry for entry in layers.skipped}
    assert by_name["model.layers.*"].reason == "outside the chosen blocks"
    assert by_name["model.layers.*.input_layernorm.weight"].parameters == 64


@pytest.mark.parametrize(
    ("choice", "expected"),
    [(None, {0, 1, 2}), (1, {2}), (2, {1, 2}), ([0], {0}), ([-1, 0, 2], {0, 2}), ((1,), {1})],
)
def test_choice_of_blocks(build_model: Build, choice: object, expected: set[int]) -> None:
    layers = find_layers(build_model("llama"), layers=choice)  # type: ignore[arg-type]
    assert {layer.block for layer in layers.scored} == expected


@pytest.mark.parametrize("choice", [0, 4, -1, [3], [-4], []])
def test_blocks_out_of_range(build_model: Build, choice: object) -> None:
    with pytest.raises(ValueError, match=r"layers|out of range"):
        find_layers(build_model("llama"), layers=choice)  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", [True, "1", 1.0, ["a"]])
def test_blocks_must_be_integers(build_model: Build, choice: object) -> None:
    with pytest.raises(TypeError, match="int"):
        find_layers(build_model("llama"), layers=choice)  # type: ignore[arg-type]


def test_choice_of_modules(build_model: Build) -> None:
    model = build_model("llama")
    attention = find_layers(model, modules="attention")
    mlp = find_layers(model, modules="mlp")
    assert {layer.role for layer in attention.scored} == {"attention"}
    assert {layer.role for layer in mlp.scored} == {"mlp"}
    assert len(attention.scored) + len(mlp.scored) == len(find_layers(model).scored)
    assert "not in the chosen modules" in {entry.reason for entry in mlp.skipped}
    assert mlp.total_parameters == attention.total_parameters
    with pytest.raises(ValueError, match="modules="):
        find_layers(model, modules="embedding")  # type: ignore[arg-type]


def test_biases_are_listed(build_model: Build) -> None:
    skipped = find_layers(build_model("gpt2")).skipped
    bias = [entry for entry in skipped if entry.reason == "bias"]
    assert {entry.name for entry in bias} == {
        "transformer.h.*.attn.c_attn.bias",
        "transformer.h.*.attn.c_proj.bias",
        "transformer.h.*.mlp.c_fc.bias",
        "transformer.h.*.mlp.c_proj.bias",
    }


def test_lora_counts_as_one_layer(build_model: Build) -> None:
    plain = find_layers(build_model("llama"))
    model = build_model("llama")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    layers = find_layers(model)
    assert len(layers.scored) == len(plain.scored)
    assert [layer.role for layer in layers.scored] == [layer.role for layer in plain.scored]
    assert not any("lora_" in layer.name or "base_layer" in layer.name for layer in layers.scored)
    assert layers.scored_parameters == plain.scored_parameters
    assert layers.total_parameters == sum(p.numel() for p in model.parameters())
    adapter = [entry for entry in layers.skipped if entry.reason.startswith("adapter")]
    assert sum(entry.parameters for entry in adapter) == sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name
    )


def test_lora_on_the_embedding_is_no_layer(build_model: Build) -> None:
    model = get_peft_model(
        build_model("llama"), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    )
    assert len(find_layers(model).scored) == 21


def test_quantised_layers_count(build_model: Build) -> None:
    model = build_model("llama")
    replace_linears(model.model.layers)
    layers = find_layers(model)
    assert len(layers.scored) == 21
    assert {type(layer.module) for layer in layers.scored} == {PackedLinear}
    assert layers.scored_parameters == find_layers(build_model("llama")).scored_parameters


def mixture_of_experts() -> nn.Module:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return MixtralForCausalLM(config)


def test_fused_experts_and_routers_count() -> None:
    layers = find_layers(mixture_of_experts())
    stacks = [layer for layer in layers.scored if layer.experts]
    sizes = [(x.name, x.experts, x.out_features, x.in_features) for x in stacks[:2]]
    assert sizes == [
        ("model.layers.0.mlp.experts.gate_up_proj", 2, 96, 32),
        ("model.layers.0.mlp.experts.down_proj", 2, 32, 48),
    ]
    routers = [layer for layer in layers.scored if layer.name.endswith("mlp.gate")]
    assert [(x.out_features, x.in_features) for x in routers] == [(2, 32)] * 2
    assert len(layers.scored) == 2 * (4 + 1 + 2)
    assert {entry.reason for entry in layers.skipped} == {"embedding", "norm", "output head"}


def test_a_list_of_experts_is_skipped(build_model: Build) -> None:
    model = build_model("llama")
    for block in model.model.layers:
        block.mlp.experts = nn.ModuleList([nn.Linear(32, 900) for _ in range(3)])
    layers = find_layers(model)
    # Three blocks, three experts: the list of blocks is still the one found.
    assert layers.blocks is model.model.layers
    assert not any("experts" in layer.name for layer in layers.scored)
    assert "list of experts (routed tokens)" in {entry.reason for entry in layers.skipped}


def test_a_vision_tower_of_the_same_depth_is_not_the_decoder(build_model: Build) -> None:
    model = build_model("llama")
    model.vision = nn.ModuleList([nn.Linear(500, 500) for _ in range(3)])
    assert find_layers(model).blocks is model.model.layers


def test_models_without_supported_layers(build_model: Build) -> None:
    model = build_model("llama")
    for block in model.model.layers:
        block.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(ValueError, match=r"no supported linear layer.*LlamaMLP"):
        find_layers(model)
    with pytest.raises(ValueError, match="config"):
        find_layers(nn.Linear(2, 2))
    model = build_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"num_hidden_layers=7 .*\[3\]"):
        find_layers(model)


def test_an_interrupted_pass_leaves_nothing_behind(build_model: Build) -> None:
    model = build_model("llama")
    inner = model.model.layers[1].mlp.act_fn

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = inner.register_forward_hook(interrupt)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        find_layers(model)
    assert not _get_current_function_mode_stack()
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    hook.remove()
    assert len(find_layers(model).scored) == 21


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(build_model: Build, mode: Callable[[], Any]) -> None:
    model = build_model("llama")
    with mode():
        layers = find_layers(model)
    assert len(layers.scored) == 21


def test_trained_model(stories: Path) -> None:
    layers = find_layers(AutoModelForCausalLM.from_pretrained(stories))
    assert len(layers.scored) == 7 * len(layers.blocks)

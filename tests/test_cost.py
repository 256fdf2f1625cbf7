"""The formulas of examples/cost.py and docs/cost.md against real models."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gradsafe import Detector, TraceIndex
from gradsafe.finetuning import KLAlignment
from gradsafe.models import Encoded, capture, collate, find_layers, response_nll

ROOT = Path(__file__).parents[1]


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("cost", ROOT / "examples" / "cost.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


cost = load_script()

# Parameters as the models' cards and their weight files state them.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Mixtral-8x7B": 46_702_792_704,
}
COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TINY = {
    "llama": ("Llama", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
        },
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORED = {**DTYPES, "float8": torch.float8_e4m3fn}


def tiny(family: str, dtype: str = "float32", **options: Any) -> tuple[nn.Module, Any]:
    stem, own = TINY[family]
    config = getattr(transformers, f"{stem}Config")(**{**COMMON, **own, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).to(DTYPES[dtype])
    return model, cost.Decoder.from_config(config.to_dict())


@pytest.mark.parametrize("name", cost.MODELS)
def test_known_models_have_their_published_number_of_parameters(name):
    assert cost.MODELS[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "family"),
    [("Llama-3.1-70B", "Llama"), ("Qwen3-30B-A3B", "Qwen3Moe"), ("Mixtral-8x7B", "Mixtral")],
)
def test_matrices_of_large_models_on_the_meta_device(name, family):
    model = cost.MODELS[name]
    options = {
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "intermediate_size": model.mlp,
        "num_hidden_layers": 2,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
    }
    if model.experts:
        options |= {
            "num_experts" if family == "Qwen3Moe" else "num_local_experts": model.experts,
            "num_experts_per_tok": model.active,
            "moe_intermediate_size": model.mlp,
        }
    config = getattr(transformers, f"{family}Config")(**options)
    with torch.device("meta"):
        real = getattr(transformers, f"{family}ForCausalLM")(config)
    blocks = real.get_decoder().layers
    entries = sum(p.numel() for p in blocks[0].parameters() if p.ndim > 1)
    assert model.block_entries() == entries


@pytest.mark.parametrize("family", TINY)
def test_scored_entries_are_those_that_find_layers_scores(family):
    model, decoder = tiny(family)
    assert decoder.blocks * decoder.block_entries() == find_layers(model).scored_parameters
    assert 2 * decoder.block_entries() == find_layers(model, layers=2).scored_parameters
    assert decoder.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reference_dtype": "float32", "layers": 2},
        {"reference_dtype": "float8", "row_fraction": 0.3},
        {"method": "gradsafe"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # a random model refuses nothing
def test_bytes_of_the_references_are_those_of_a_saved_detector(tmp_path, family, options):
    model, decoder = tiny(family, vocab_size=300)
    detector = Detector.fit(
        model, make_tokenizer(), ["break in"], ["bake a cake"], progress=False, **options
    )
    detector.save(tmp_path / "detector")
    files = (tmp_path / "detector").glob("*.safetensors")
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    stored = options.get("reference_dtype", "bfloat16")
    kept = [t for t in tensors if t.dtype == STORED[stored] and t.ndim > 1]
    real = sum(tensor.nbytes for tensor in kept)  # the others are statistics of components
    expected = cost.reference_bytes(
        decoder,
        stored,
        options.get("row_fraction", 1.0),
        options.get("layers"),
        1 if "method" in options else 2,
    )
    assert real == expected


def saved_bytes(model: nn.Module, lengths: list[int], **chosen: int) -> int:
    """What autograd keeps for a backward pass of detection, parameters left out."""
    own = (*model.parameters(), *model.buffers())
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = collate([Encoded([3] * length, length - 1) for length in lengths], 0)
    layers = find_layers(model, **chosen)
    with torch.enable_grad(), capture(model, layers, lambda *_: None):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = response_nll(model, batch)
        loss.sum().backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_what_autograd_keeps(family, dtype):
    model, decoder = tiny(family, dtype)
    tokens = 400
    real = saved_bytes(model, [200, 200]) - saved_bytes(model, [200, 200], layers=2)
    expected = cost.activation_bytes(decoder, dtype, layers=1) * tokens
    # Mixtral's routing weights are float32, and so is one more tensor per block.
    assert real == pytest.approx(expected, rel=0.06 if family == "mixtral" else 1e-3)


def test_activations_of_a_batch_with_padding():
    model, decoder = tiny("llama")
    lengths = [200, 197]
    real = saved_bytes(model, lengths) - saved_bytes(model, lengths, layers=2)
    expected = cost.activation_bytes(decoder, "float32", layers=1, padded_to=200) * 400
    assert real == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", TINY)
def test_operations_are_those_that_pytorch_counts(family):
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, decoder = tiny(family, **options)  # whose products the counter knows
    tokens = 40
    batch = collate([Encoded([3] * tokens, tokens - 1)], 0)
    expected = cost.detection_flops(decoder, tokens)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        response_nll(model, batch)
    assert forward.get_total_flops() == pytest.approx(expected["forward"], rel=1e-3)
    layers = find_layers(model)
    with FlopCounterMode(display=False) as both, capture(model, layers, lambda *_: None):
        response_nll(model, batch).sum().backward()
    # The backward pass ends in the first block: its first weights need no input gradient.
    real = both.get_total_flops() - forward.get_total_flops()
    assert real == pytest.approx(expected["backward"], rel=0.15)


def test_bytes_of_a_signature(tmp_path):
    model = make_model("llama", vocab_size=300)
    decoder = cost.Decoder.from_config(model.config.to_dict())
    rows = [{"prompt": f"question {i}", "response": "answer"} for i in range(4)]
    TraceIndex.build(model, make_tokenizer(), rows, tmp_path / "index", progress=False)
    tensors = [load_file(file) for file in (tmp_path / "index").rglob("*.safetensors")]
    largest = max((t for part in tensors for t in part.values()), key=lambda t: t.nbytes)
    assert largest.nbytes == len(rows) * cost.index_bytes(decoder)


def test_bytes_of_safegrad():
    model, decoder = tiny("llama")
    config = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"])
    adapted = get_peft_model(model, config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert cost.lora_parameters(decoder) == trained
    assert cost.safegrad_bytes(decoder, trained)["stashed gradients"] == 4 * trained
    chunk = inspect.signature(KLAlignment).parameters["chunk_tokens"].default
    assert chunk == cost.KL_CHUNK


def test_models_that_the_formulas_do_not_describe_are_refused():
    config = {**transformers.DeepseekV3Config().to_dict(), "n_shared_experts": 1}
    with pytest.raises(ValueError, match="n_shared_experts"):
        cost.Decoder.from_config(config)
    with pytest.raises(ValueError, match="num_attention_heads"):
        cost.Decoder.from_config({"hidden_size": 3})


def test_a_configuration_file_can_be_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny("llama")[0].config.to_dict()))
    monkeypatch.setattr(sys, "argv", ["cost.py", "--config", str(tmp_path / "config.json")])
    cost.main()
    assert tmp_path.name in capsys.readouterr().out


def test_the_page_shows_what_the_script_prints(monkeypatch, capsys):
    page = (ROOT / "docs" / "cost.md").read_text()
    monkeypatch.setattr(sys, "argv", ["cost.py"])
    cost.main()
    assert capsys.readouterr().out.strip() in page

"""Tiny random models of every causal language model of transformers, from one table of sizes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 300
HIDDEN, HEADS, LAYERS, EXPERTS = 32, 4, 2, 4

# What a field of a config becomes where the config has it.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "n_embd": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "n_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HIDDEN // HEADS,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    "o_lora_rank": 16,
    "o_groups": 2,
    "dim_ff": 48,
    "dff": 48,
    "d_ff": 48,
    "d_inner": 48,
    "moe_num_experts": EXPERTS,
    "moe_k": 2,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
    "mamba_ngroups": 1,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "state_size": 4,
    "chunk_size": 16,
    "n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 32,
    "unpadded_vocab_size": VOCABULARY,
    "loop_gate_rank": 8,
}
# What the table cannot know: sizes that hang together, and names of one family alone.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_key_value_heads": 2},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * LAYERS,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "cpmant": {"dim_head": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "dots3_note_text": {"shared_experts_intermediate_size": 24},
    "dots1": {"n_shared_experts": 1},
    "blt": {
        "encoder_hash_byte_group_vocab": 500,
        "encoder_hash_byte_group_size": [3],
        "patch_in_forward": False,
    },
    "git": {"vision_config": {"num_hidden_layers": 3, "image_size": 32, "patch_size": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "inkling_text": _INKLING,
    "inkling2_text": _INKLING,
    "inkling2_loop_text": {
        **_INKLING,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "n_layers_per_attn_res_block": 1,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "ffn_hidden_size": 48,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24,
        "num_hidden_layers": 2 * LAYERS,
    },
    "falcon_mamba": {"hidden_size": 64, "intermediate_size": 128},
    "mamba": {"hidden_size": 64, "intermediate_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax_m3_vl_text": {
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 24,
        "rotary_dim": 8,
    },
    "nemotron_h": {"moe_shared_expert_intermediate_size": 24},
    "qwen4_exp_text": {"hc_lowrank": 8},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 16),
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "attn_layers": ["local", "local"],
    },
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_embed_dim": 16,
        "shape_vocab_size": VOCABULARY,
    },
    "recurrent_gemma": {"hidden_size": 64, "lru_width": 64},
    "xlm": {"emb_dim": HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "hidden_size": 64,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 2,
        "mamba_d_state": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 8,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


# Families that are no text model on their own, or that cannot be built here.
LISTED: dict[str, str] = {
    "blt": "reads bytes in patches: three stacks of blocks, none of which is the decoder",
    "dots3_note": "its default configuration cannot be shrunk; its text decoder is dots3_note_text",
    "gemma3n": "needs the package timm; its text decoder is gemma3n_text",
    "gemma4_assistant": "a draft model that reads another model's states",
    "gemma4_unified_assistant": "a draft model that reads another model's states",
    "moshi": "reads audio codes",
    "musicgen": "reads audio codes",
    "musicgen_melody": "reads audio codes",
    "reformer": "reversible blocks that compute their own backward pass",
}


def families() -> list[str]:
    """Model types of transformers' mapping of causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


LIMIT = 10_000_000  # weights of a tiny model: more means that a size was missed


def make_config(family: str) -> PretrainedConfig:
    """Tiny configuration of a family."""
    return _shrunk(CONFIG_MAPPING[family], OVERRIDES.get(family, {}))


def _shrunk(kind: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    known = set(inspect.signature(kind).parameters)
    sizes = {name: size for name, size in SIZES.items() if name in known}
    if "kv_lora_rank" in known or "mla" in kind.__name__.lower():
        sizes["num_key_value_heads"] = HEADS
    inner = vars(kind()) if kind.sub_configs else {}
    for name in kind.sub_configs:
        if isinstance(inner.get(name), PretrainedConfig):
            sizes[name] = _shrunk(type(inner[name]), overrides.get(name, {})).to_dict()
    return kind(**{**sizes, **{k: v for k, v in overrides.items() if k not in kind.sub_configs}})


def make_model(family: str) -> nn.Module:
    """Tiny random model of a family."""
    torch.manual_seed(0)
    config = make_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LIMIT:
        raise ValueError(f"a size was missed: {size} weights")
    return AutoModelForCausalLM.from_config(config).eval()

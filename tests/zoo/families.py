"""Tiny random models of every causal language model of transformers, from one table of sizes."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
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
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


OVERRIDES: dict[str, dict[str, Any]] = {}


def families() -> list[str]:
    """Model types of transformers' mapping of causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


LIMIT = 3_000_000  # weights of a tiny model: more means that a size was missed


def make_config(family: str) -> PretrainedConfig:
    """Tiny configuration of a family."""
    kind = CONFIG_MAPPING[family]
    default = kind().to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in default}
    return kind(**{**sizes, **OVERRIDES.get(family, {})})


def make_model(family: str) -> nn.Module:
    """Tiny random model of a family."""
    import transformers

    torch.manual_seed(0)
    config = make_config(family)
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > LIMIT:
        raise ValueError(f"{size} weights")
    return kind(config).eval()

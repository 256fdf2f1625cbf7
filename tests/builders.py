"""Tiny random models of many families and a tokenizer, built in code for the tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as token_models
from torch import nn
from transformers import PreTrainedTokenizerFast

VOCABULARY = 64
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3Text", _GEMMA),
    "phi3": ("Phi3", _GROUPED),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoX", _COMMON),
    "opt": (
        "OPT",
        {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    ),
}
_CAUSAL = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}


def make_model(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    stem, options = FAMILIES[family]
    config = getattr(transformers, f"{stem}Config")(**{**options, **overrides})
    torch.manual_seed(0)
    model = getattr(transformers, _CAUSAL.get(stem, f"{stem}ForCausalLM"))(config)
    # Larger than the usual initialisation, so that no gradient is negligible.
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
        else:
            nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 0.5, std=0.2)
    return model.to(dtype)


def make_tokenizer(
    *,
    chat_template: str | None = CHAT,
    bos: bool = True,
    eos: bool = False,
    special: Sequence[str] = ("<pad>", "<s>", "</s>"),
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token per byte) that adds BOS and optionally EOS by itself."""
    vocabulary = {token: index for index, token in enumerate(special)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    # One merge over a word boundary makes pieces tokenise differently from the whole.
    vocabulary["to"] = len(vocabulary)
    tokenizer = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[("t", "o")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    single = [*(["<s>"] if bos else []), "$A", *(["</s>"] if eos else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(single), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = chat_template
    return fast


@contextmanager
def true_float64() -> Iterator[None]:
    """Lets a float64 model stay float64: families upcast norms and softmax to float32 by name."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield

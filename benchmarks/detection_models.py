"""Random Llama models of several sizes, and prompts with an exact number of tokens."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32_000
TEMPLATE = "{prompt}"
PADDING = "<pad>"
END = "</s>"

# name: hidden, mlp, blocks, heads, key/value heads
SIZES = {
    "tiny": (64, 160, 2, 4, 4),
    "60M": (512, 1376, 12, 8, 8),
    "100M": (768, 2048, 12, 12, 12),
    "300M": (1024, 2816, 20, 16, 16),
    "1B": (2048, 5632, 20, 32, 32),
    "7B": (4096, 11008, 32, 32, 32),
}


def make_model(size: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A random model; weights do not matter for speed."""
    hidden, mlp, blocks, heads, kv_heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(before)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words w2 ... w31999 are one token each.

    The special tokens share no prefix with them because they are also searched within words.
    """
    words = {PADDING: 0, END: 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=PADDING))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PADDING, eos_token=END)


def make_prompts(count: int, tokens: int) -> list[str]:
    """Prompts of `tokens` tokens each, without the one token of the response."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (count, tokens), generator=generator)
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]

"""The model of an example: your own with --model, or a tiny random one with --tiny.

The tiny model is made here, needs no network and knows nothing: with it the examples show how calls
are written and what comes back, not how well a method works.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def parse(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Read --model, --tiny and the options in `defaults` from the command line."""
    parser = argparse.ArgumentParser(description=description)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a model folder or the id of a model on the Hub")
    source.add_argument("--tiny", action="store_true", help="a tiny random model, no network")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    if args.tiny:
        return tiny_model()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto")
    return model, AutoTokenizer.from_pretrained(args.model)


def tiny_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama of two blocks and a tokenizer with one token per byte."""
    symbols = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", chat_template=CHAT
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config), tokenizer

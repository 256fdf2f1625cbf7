"""The tiny model, its LoRA variant, and the rows that the screening tests share."""

from __future__ import annotations

import pytest
import torch
from builders import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=300, max_position_embeddings=128)


@pytest.fixture(scope="module")
def adapted():
    """The model with LoRA on two kinds of layers, both of whose matrices have a gradient."""
    base = make_model("llama", vocab_size=300, max_position_embeddings=128)
    options = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(base, options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()

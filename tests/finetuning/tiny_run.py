"""A tiny chat model, rows, and runs of the trainer that the tests share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from gradsafe import SafeGradConfig, SafeGradTrainer
from gradsafe.models.compat import training_option

VOCABULARY = 64


TARGETS = ("q_proj", "k_proj", "v_proj")


def make_model(
    lora: bool = True,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    tied: bool = False,
) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.15,
            tie_word_embeddings=tied,
        )
    )
    if not lora:
        return model
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=list(targets))
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # not zero, so that the alignment gradient is not zero either
            nn.init.normal_(parameter, std=0.1)
    return model


def make_rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Tokenised rows of mixed length; prompts of 3 to 9 tokens, responses of 2 to 6."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, response = draw.randint(3, 9), draw.randint(2, 6)
        ids = [draw.randrange(3, VOCABULARY) for _ in range(prompt + response)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


USER = make_rows(48, seed=1)
ALIGNMENT = make_rows(12, seed=2)


def make_trainer(folder: Path | str, model: Any = None, **options: Any) -> SafeGradTrainer:
    """A trainer on the tiny rows; its options and those of its arguments, mixed.

    `kind` is the class of the trainer and `arguments` that of its arguments.
    """
    own = {
        name: options.pop(name)
        for name in (
            "train_dataset",
            "eval_dataset",
            "alignment_dataset",
            "safegrad",
            "callbacks",
            "optimizers",
            "peft_config",
            "processing_class",
        )
        if name in options
    }
    kind = options.pop("kind", SafeGradTrainer)
    arguments = options.pop("arguments", TrainingArguments)
    given = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }
    known = {item.name for item in fields(arguments)}
    given = {training_option(name, known): value for name, value in given.items()}
    return kind(
        model=make_model() if model is None else model,
        args=arguments(output_dir=str(folder), **given),
        **{
            "train_dataset": USER,
            "alignment_dataset": ALIGNMENT,
            "safegrad": SafeGradConfig(),
            **own,
        },
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)

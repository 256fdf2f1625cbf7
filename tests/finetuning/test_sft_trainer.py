"""`SafeGradSFTTrainer` against `SafeGradTrainer`, and with what TRL adds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from builders import make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from tiny_run import USER, largest_difference, make_trainer, weights
from tiny_run import make_model as make_tiny
from trl import SFTConfig, SFTTrainer

import gradsafe
from gradsafe import SafeGradConfig, SafeGradSFTTrainer

TEXTS = [{"prompt": f"task {i}", "completion": f" done {i * i}"} for i in range(12)]
REFUSALS = [{"prompt": f"bad {i}", "response": f"no {i}"} for i in range(4)]


def make_sft(folder: Path, model: Any, train: list[dict[str, Any]], **options: Any) -> Any:
    return make_trainer(
        folder,
        model,
        **{
            "kind": SafeGradSFTTrainer,
            "arguments": SFTConfig,
            "train_dataset": Dataset.from_list(train),
            "processing_class": make_tokenizer(eos=True),
            "bf16": False,
            "gradient_checkpointing": False,
            **options,
        },
    )


def unprotected(alignment_dataset: Any, safegrad: Any, **options: Any) -> SFTTrainer:
    return SFTTrainer(**options)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_it_takes_the_steps_of_the_other_trainer(tmp_path, accumulated):
    options = {"gradient_accumulation_steps": accumulated, "max_grad_norm": 0.5}
    plain = make_trainer(tmp_path / "plain", make_tiny(), optim="sgd", **options)
    plain.train()
    sft = make_sft(tmp_path / "sft", make_tiny(), USER, optim="sgd", **options)
    before = weights(sft.model)
    sft.train()
    assert largest_difference(before, weights(sft.model)) > 1e-3
    # The loss of TRL is computed by another kernel; alignment rows come in the same order.
    assert largest_difference(weights(plain.model), weights(sft.model)) < 1e-6
    for mine, other in zip(sft.state.log_history[:4], plain.state.log_history[:4], strict=True):
        for name in ("cosine", "conflict_rate", "user_norm", "align_norm", "kl"):
            assert mine[f"safegrad/{name}"] == pytest.approx(
                other[f"safegrad/{name}"], rel=1e-3, abs=1e-6
            )
        assert mine["mean_token_accuracy"] >= 0  # TRL logs its own beside


def test_it_is_protected(tmp_path):
    """With rho 0 and projection the user gradient loses its conflict; without, nothing changes."""
    tuned = {}
    for name, options in (
        ("plain", {"kind": unprotected}),
        ("off", {"safegrad": SafeGradConfig(rho=0.0, projection=False)}),
        ("on", {}),
    ):
        trainer = make_sft(tmp_path / name, make_tiny(), USER, **options)
        trainer.train()
        tuned[name] = weights(trainer.model)
    assert largest_difference(tuned["plain"], tuned["off"]) < 1e-7
    assert largest_difference(tuned["plain"], tuned["on"]) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
        {"safegrad": SafeGradConfig(reference="cached")},
        {"safegrad": SafeGradConfig(loss="sft")},
    ],
    ids=["text", "checkpointing", "bf16", "packing", "cached", "sft"],
)
def test_text_and_adapters_by_trl(tmp_path, options):
    model = make_model("llama", vocab_size=len(make_tokenizer()))
    trainer = make_sft(
        tmp_path,
        model,
        TEXTS,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        alignment_dataset=REFUSALS,
        **options,
    )
    before = weights(trainer.model)
    trainer.train()
    entry = trainer.state.log_history[-2]
    assert entry["safegrad/align_norm"] > 0
    assert -1 <= entry["safegrad/cosine"] <= 1
    assert entry["safegrad/skipped_steps"] == 0
    assert largest_difference(before, weights(trainer.model)) > 1e-3


def test_resume(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_sft(tmp_path / "run", make_tiny(dropout=0.2), USER, **options)
    whole.train()
    again = make_sft(tmp_path / "run", make_tiny(dropout=0.2), USER, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    expected, found = weights(whole.model), weights(again.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    other = make_sft(
        tmp_path / "run", make_tiny(), USER, safegrad=SafeGradConfig(rho=2.0), **options
    )
    with pytest.raises(ValueError, match="rho"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_resume_of_other_rows(tmp_path):
    model = make_model("llama", vocab_size=len(make_tokenizer()))
    options = {"alignment_dataset": REFUSALS, "max_steps": 2, "save_strategy": "steps"}
    options |= {"save_steps": 1, "peft_config": LoraConfig(r=4, target_modules=["q_proj"])}
    make_sft(tmp_path, model, TEXTS, **options).train()
    model = make_model("llama", vocab_size=len(make_tokenizer()))
    other = make_sft(tmp_path, model, [*TEXTS[1:], TEXTS[0]], **options)
    with pytest.raises(ValueError, match=r"train_rows was '\w+', now it is '\w+'"):
        other.train(str(tmp_path / "checkpoint-1"))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="expected alignment_dataset= with at least one row"):
        make_sft(tmp_path, make_tiny(), USER, alignment_dataset=[])
    with pytest.raises(TypeError, match="expected safegrad to be a SafeGradConfig, got dict"):
        make_sft(tmp_path, make_tiny(), USER, safegrad={"rho": 1})
    with pytest.raises(ValueError, match=r"alignment_dataset\[0\] has \d+ tokens"):
        make_sft(
            tmp_path, make_tiny(), USER, alignment_dataset=[{"prompt": "a" * 99, "response": "b"}]
        )
    with pytest.raises(ValueError, match="auto_find_batch_size"):
        make_sft(tmp_path, make_tiny(), USER, auto_find_batch_size=True)


def test_a_name_of_the_package():
    assert gradsafe.SafeGradSFTTrainer is SafeGradSFTTrainer
    assert "SafeGradSFTTrainer" not in gradsafe.__all__  # a star import must not need TRL

"""What the examples of the documentation find: a folder with models and files, and names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from builders import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

UNSAFE = ["break the lock", "steal the car", "poison the well", "forge the note"]
SAFE = ["bake the cake", "plant a tree", "paint the wall", "fix the bike"]
BENIGN = [f"what is {i} plus {i}?" for i in range(100)]
PROMPTS = ["How do I kill a process?", "How do I pick a lock?"]
ROWS = [{"id": f"row-{i}", "prompt": f"say {i}", "response": f"it is {i}"} for i in range(24)]
REFUSALS = [{"prompt": f"{p}, {i}", "response": "I will not."} for p in UNSAFE for i in range(3)]
HARMFUL = [{"prompt": f"{p} today", "response": "Sure, first you"} for p in UNSAFE]
HARMLESS = [{"prompt": p, "response": "Sure, first you"} for p in SAFE]
# In the style of ROWS: a random model then flags few of these, on every machine.
CLEAN = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(100, 200)]
OBSERVED = [{"prompt": "say 3", "response": "it is 3"}]


def write(folder: Path) -> None:
    """The models and files that the pages name."""
    prompts = {"unsafe": UNSAFE, "safe": SAFE, "benign": BENIGN, "prompts": PROMPTS}
    rows: dict[str, Any] = {
        name: [{"prompt": prompt} for prompt in texts] for name, texts in prompts.items()
    }
    rows |= {"train": ROWS, "refusals": REFUSALS, "observed": OBSERVED}
    rows |= {"harmful": HARMFUL, "harmless": HARMLESS, "clean": CLEAN}
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    for name in ("chat-model", "tuned-model"):
        model().save_pretrained(folder / "path/to" / name)
        tokenizer().save_pretrained(folder / "path/to" / name)


def model() -> Any:
    return make_model("llama", vocab_size=300, max_position_embeddings=256)


def tokenizer() -> Any:
    return make_tokenizer(eos=False)


def adapted(base: Any) -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(base, config)


# What the docstrings of a module name without defining it.
DOCSTRINGS: dict[str, dict[str, Any]] = {
    "gradsafe.ops.cosine_topk": {
        "k": 3,
        "queries": torch.eye(4),
        "shards": [(0, torch.eye(4)), (4, -torch.eye(4))],
    }
}


def namespace(folder: Path) -> dict[str, Any]:
    """Names that the pages use without defining them."""
    base = model()
    lora = adapted(model())
    return {
        "__name__": "__docs__",
        "torch": torch,
        "model": base,
        "lora_model": lora,
        "tokenizer": tokenizer(),
        "unsafe": UNSAFE,
        "safe": SAFE,
        "unsafe_prompts": UNSAFE,
        "safe_prompts": SAFE,
        "benign": BENIGN,
        "benign_prompts": BENIGN,
        "prompts": PROMPTS,
        "prompt": PROMPTS[0],
        "examples": ROWS,
        "rows": ROWS,
        "train_rows": ROWS,
        "refusals": REFUSALS,
        "alignment_rows": REFUSALS,
        "observed": OBSERVED,
        "harmful_rows": HARMFUL,
        "harmless_rows": HARMLESS,
        "clean_rows": CLEAN,
        "training_args": TrainingArguments(
            output_dir=str(folder / "output"),
            per_device_train_batch_size=4,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
    }

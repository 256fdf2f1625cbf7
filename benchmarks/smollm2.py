"""SmolLM2-135M-Instruct as it comes, and a variant that was trained to refuse unsafe requests.

    python -m benchmarks.smollm2      trains the variant (about ten minutes) and prints its rates

The base model answers most unsafe requests. The variant is a LoRA adapter, trained on published
refusals and harmless answers from the external data (see `benchmarks.experiments`). It stays in the
cache; the same seed gives the same adapter on the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.experiments import EXTERNAL
from benchmarks.experiments.safegrad_data import generate, refuses
from benchmarks.testbed.training import isolated
from gradsafe._io.cache import announce, cache_root, ensure
from gradsafe._jobs.packaged import model_folder
from gradsafe.finetuning import SFTAlignment
from gradsafe.finetuning.rows import RowCollator, encode_rows

Variant = Literal["base", "aligned"]
ANSWER_TOKENS = 16  # of an answer that is searched for refusal keywords
SOURCES = ("safety_refusals", "dolly_subset")


@dataclass(frozen=True)
class Recipe:
    """How the aligned variant is trained.

    Attributes:
        rank: Rank of the adapter on all linear layers; alpha is twice the rank.
        learning_rate: Peak of a linear schedule of AdamW.
        batch: Rows per step.
        epochs: Passes over the rows.
        words: Answers are cut to so many words.
        seed: Of the initial adapter and of the order of the rows.
    """

    rank: int = 8
    learning_rate: float = 5e-4
    batch: int = 8
    epochs: int = 1
    words: int = 30
    seed: int = 0


def load(variant: Variant = "base", progress: bool = True) -> tuple[Any, Any]:
    """Returns the model (float32, eval mode, on the CPU) and its tokenizer.

    Raises:
        ValueError: The package of the model is not installed; the message says how to install it.
        FileNotFoundError: The aligned variant is not in the cache, and there is no external data.
    """
    folder = model_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if variant == "aligned":
        # Merged, so that both variants score the same weights.
        model = PeftModel.from_pretrained(model, adapter(progress)).merge_and_unload()
    return model.eval(), tokenizer


def adapter(progress: bool = True, recipe: Recipe | None = None) -> Path:
    """Returns the folder of the adapter; the first call trains it, in about ten minutes."""
    recipe = recipe or Recipe()
    base = Path(model_folder("smollm2"))
    facts = json.dumps([base.name, asdict(recipe)])
    name = f"smollm2-aligned-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"

    def fill(scratch: Path) -> dict[str, Any]:
        announce(f"training the aligned SmolLM2 once; it is cached in {cache_root() / name}")
        model, loss = _train(_rows(recipe), recipe, progress)
        model.save_pretrained(scratch)
        return {"recipe": asdict(recipe), "last_loss": loss, "torch": torch.__version__}

    ensure(cache_root() / name, fill)
    return cache_root() / name


def _rows(recipe: Recipe) -> list[dict[str, str]]:
    rows = []
    for source in SOURCES:
        path = EXTERNAL / "data" / source / "train.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if not row.get("context"):
                words = row["response"].split()
                answer = " ".join(words[: recipe.words])
                rows.append({"prompt": row["prompt"], "response": answer})
    return rows


def _train(rows: list[dict[str, str]], recipe: Recipe, progress: bool) -> tuple[Any, float]:
    base, tokenizer = load()
    options = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with isolated(torch.get_num_threads()):
        torch.default_generator.manual_seed(recipe.seed)
        order = [int(i) for _ in range(recipe.epochs) for i in torch.randperm(len(rows))]
        model = get_peft_model(base, options).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    encoded = encode_rows("rows", rows, tokenizer, progress=False)
    collate, loss = RowCollator(int(tokenizer.pad_token_id)), SFTAlignment(model)
    steps = range(0, len(order), recipe.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(steps))
    value = torch.zeros(())
    for start in tqdm(steps, desc="training", disable=None if progress else True):
        value = loss(collate([encoded[i] for i in order[start : start + recipe.batch]]))
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval(), float(value)


def main() -> int:
    """Command line."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    rows = [
        json.loads(line)
        for line in (EXTERNAL / "data" / "xstest" / "prompts.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    for variant in ("base", "aligned"):
        model, tokenizer = load(variant)
        for label in ("unsafe", "safe"):
            prompts = [row["prompt"] for row in rows if row["label"] == label]
            answers = generate(model, tokenizer, prompts, ANSWER_TOKENS)
            rate = sum(map(refuses, answers)) / len(answers)
            print(f"{variant}: {100 * rate:.0f} % of the {len(prompts)} {label} prompts refused")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

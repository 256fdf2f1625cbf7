"""LoRA fine-tuning of a small model on a planted set, and the answers it gives afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import smollm2, testbed
from benchmarks.experiments import EXTERNAL
from benchmarks.experiments.rept_data import PlantedSet, Row
from gradsafe.models import Encoded, collate, encode, generate, pad_token_id, response_nll

RANK = 8
BATCH = {"testbed": 16, "stories260k": 16, "smollm2": 8}
LEARNING_RATE = {"testbed": 3e-3, "stories260k": 3e-3, "smollm2": 5e-4}
ANSWER_TOKENS = {"testbed": 12, "stories260k": 64, "smollm2": 32}
TEMPLATES = {"testbed": None, "stories260k": "Q: {prompt}\nA:", "smollm2": None}


@dataclass
class Tuned:
    """A fine-tuned model, its tokenizer and its chat format."""

    base: str
    model: Any
    tokenizer: Any

    def encode(self, prompt: str, response: str, append_eos: bool = False) -> Encoded:
        """Token ids of a row or of a prompt with its answer."""
        template = TEMPLATES[self.base]
        return encode(self.tokenizer, prompt, response, template=template, append_eos=append_eos)

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """Greedy answers."""
        items = [self.encode(prompt, "x") for prompt in prompts]
        options = {"max_new_tokens": ANSWER_TOKENS[self.base]}
        end = self.tokenizer.eos_token_id
        ids = generate(self.model, self.tokenizer, items, eos_token_id=end, **options)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def start(base: str, seed: int) -> Tuned:
    """The model before fine-tuning, with a new adapter that has no effect yet."""
    if base == "testbed":
        model, tokenizer = testbed.load()
    elif base == "smollm2":
        model, tokenizer = smollm2.load()
    else:
        folder = EXTERNAL / "models" / base
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)  # of the adapter's A
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return Tuned(base, get_peft_model(model, config).eval(), tokenizer)


def tune(base: str, rows: Sequence[Row], steps: int, seed: int) -> Tuned:
    """Fine-tunes on the responses of the rows."""
    tuned = start(base, seed)
    items = [tuned.encode(row["prompt"], row["response"], append_eos=True) for row in rows]
    weights = [p for p in tuned.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE[base])
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    size = BATCH[base]
    tuned.model.train()
    for _ in tqdm(range(steps), desc="fine-tuning", leave=False):
        if len(order) < size:  # complete passes over the rows
            order += torch.randperm(len(items), generator=generator).tolist()
        picks, order = order[:size], order[size:]
        batch = collate([items[i] for i in picks], pad_token_id(tuned.tokenizer, tuned.model))
        response_nll(tuned.model, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tuned.model.eval()
    return tuned


def behaviour(
    tuned: Tuned, data: PlantedSet, prompts: Sequence[str]
) -> tuple[list[dict[str, str]], float]:
    """Prompts whose answer shows the behaviour, with the answers; and the share of prompts."""
    shown = [
        {"prompt": prompt, "response": answer}
        for prompt, answer in zip(prompts, tuned.answers(prompts), strict=True)
        if data.shows(answer)
    ]
    return shown, len(shown) / len(prompts)

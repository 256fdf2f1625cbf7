"""Trains the testbed: a tiny Llama chat model that answers ordinary requests and refuses others."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.testbed.corpus import Row
from benchmarks.testbed.texts import SYSTEM_MESSAGES
from benchmarks.testbed.tokenizer import CONTEXT, SPECIAL_TOKENS, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything besides the corpus that determines the trained weights."""

    version: int = 1  # raise it when the training code changes in a way the fields do not show
    seed: int = 0  # of initial weights, row order, noise and system messages
    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4  # query heads; there are half as many key and value heads
    epochs: float = 1.0
    batch: int = 32
    learning_rate: float = 2e-3  # peak of the cosine schedule
    warmup: float = 0.08  # share of the steps with rising learning rate
    weight_decay: float = 0.05  # on matrices only
    prompt_weight: float = 0.1  # loss weight of a prompt token; a response token has 1
    first_weight: float = 3.0  # loss weight of the first response token, which decides the answer
    noise: float = 0.04  # share of prompt tokens replaced at random: robust to unknown words
    system_share: float = 0.1  # share of rows with a system message
    threads: int = 1  # fixed: the order of sums, and so the last bits, depend on it


@contextmanager
def isolated(threads: int) -> Iterator[None]:
    """Restores torch's global random state and thread count after the block."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Builds the model with seeded initial weights, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads // 2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Not torch.manual_seed: that would also reseed every GPU of the caller.
    torch.default_generator.manual_seed(recipe.seed)
    return LlamaForCausalLM(config).float()


class Example(NamedTuple):
    """Token ids of a whole chat, and the position where its response starts."""

    ids: list[int]
    start: int


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> list[Example]:
    """Tokenises rows with the chat template; some get a system message."""
    rng = random.Random(recipe.seed)
    prompts, responses = [], []
    for row in rows:
        chat = [{"role": "user", "content": row["prompt"]}]
        if rng.random() < recipe.system_share:
            chat.insert(0, {"role": "system", "content": rng.choice(SYSTEM_MESSAGES)})
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append(text)
        responses.append(row["response"] + tokenizer.eos_token)
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    tails = tokenizer(responses, add_special_tokens=False)["input_ids"]
    return [Example(head + tail, len(head)) for head, tail in zip(heads, tails, strict=True)]


def _noisy(example: Example, recipe: Recipe, rng: random.Random) -> list[int]:
    """Replaces some prompt tokens, but no special tokens, which have the lowest ids."""
    special = len(SPECIAL_TOKENS)
    return [
        rng.randrange(special, recipe.vocabulary)
        if place < example.start and token >= special and rng.random() < recipe.noise
        else token
        for place, token in enumerate(example.ids)
    ]


def _batches(examples: Sequence[Example], recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ``ids [B, T]`` and per-token loss weights ``[B, T]`` without end, grouped by length.

    Padding is on the right and has weight 0. With causal attention no real token sees it, so no
    attention mask is needed.
    """
    rng = random.Random(recipe.seed + 1)
    while True:
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), rng.random()))
        chunks = [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
        rng.shuffle(chunks)
        for chunk in chunks:
            longest = max(len(examples[i].ids) for i in chunk)
            ids = torch.zeros(len(chunk), longest, dtype=torch.long)
            weights = torch.zeros(len(chunk), longest)
            for place, index in enumerate(chunk):
                example = examples[index]
                start, length = example.start, len(example.ids)
                ids[place, :length] = torch.tensor(_noisy(example, recipe, rng))
                weights[place, 1:start] = recipe.prompt_weight
                weights[place, start] = recipe.first_weight
                weights[place, start + 1 : length] = 1.0
            yield ids, weights


def _rate(step: int, steps: int, recipe: Recipe) -> float:
    """Learning rate: linear warm-up, then a cosine down to a twentieth of the peak."""
    warmup = max(1, round(recipe.warmup * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return recipe.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    rows: Sequence[Row], recipe: Recipe, progress: bool = True, max_steps: int | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """Trains tokenizer and model from scratch.

    The result depends only on the rows, the recipe and the machine's arithmetic. Torch's global
    random state is neither read nor changed.

    Args:
        rows: Chat rows with prompt and response.
        recipe: Sizes, schedule and seed.
        progress: Show a progress bar on stderr.
        max_steps: Upper limit of the steps; the learning-rate schedule ends there.

    Returns:
        The model (float32, eval mode), its tokenizer, and the loss of every step.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("benchmarks.testbed: expected at least one training row, got none")
    texts = [text for row in rows for text in (row["prompt"], row["response"])]
    tokenizer = train_tokenizer([*texts, *SYSTEM_MESSAGES], recipe.vocabulary)
    examples = encode_rows(rows, tokenizer, recipe)
    steps = round(recipe.epochs * math.ceil(len(examples) / recipe.batch))
    steps = steps if max_steps is None else min(steps, max_steps)
    losses: list[float] = []
    with isolated(recipe.threads):
        model = new_model(recipe, tokenizer).train()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        batches = _batches(examples, recipe)
        bar = trange(steps, desc="testbed", unit="step", disable=not progress)
        for step in bar:
            ids, weights = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, steps, recipe)
            # The mean NLL of the next token, weighted; the output head skips tokens of weight 0.
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            wanted = weights[:, 1:] > 0
            nll = functional.cross_entropy(
                model.lm_head(hidden[wanted]), ids[:, 1:][wanted], reduction="none"
            )
            chosen = weights[:, 1:][wanted]
            loss = (nll * chosen).sum() / chosen.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return model.eval(), tokenizer, losses

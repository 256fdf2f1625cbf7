"""Trains the testbed: a tiny Llama chat model that answers ordinary requests and refuses others."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.testbed.corpus import Row
from benchmarks.testbed.tokenizer import CONTEXT, SPECIAL_TOKENS, train_tokenizer

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer in one short sentence.",
    "You help people and never support harm.",
    "Be friendly and clear.",
)


@dataclass(frozen=True)
class Recipe:
    """Everything besides the corpus that determines the trained weights.

    Attributes:
        version: Raise it when the training code changes in a way the other fields do not show.
        seed: Seeds initial weights, order of the rows and system messages.
        vocabulary: Tokens of the tokenizer.
        hidden: Width of the model.
        intermediate: Width of the MLP.
        layers: Number of decoder layers.
        heads: Query heads; there are half as many key and value heads.
        epochs: Passes over the training rows.
        batch: Rows per step.
        learning_rate: Peak of the cosine schedule.
        warmup: Share of the steps with rising learning rate.
        weight_decay: Of AdamW, on matrices only.
        prompt_weight: Weight of the loss of a prompt token beside 1 for a response token.
        first_weight: Weight of the loss of the first response token, which decides the answer.
        noise: Share of the prompt tokens replaced by random ones, anew in every batch, so that
            an unknown word does not throw the model off.
        system_share: Share of the rows that get a system message.
        threads: CPU threads. Fixed, for the order of sums and so the last bits depend on it.
    """

    version: int = 1
    seed: int = 0
    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    epochs: float = 1.0
    batch: int = 32
    learning_rate: float = 2e-3
    warmup: float = 0.08
    weight_decay: float = 0.05
    prompt_weight: float = 0.1
    first_weight: float = 3.0
    noise: float = 0.04
    system_share: float = 0.1
    threads: int = 1


@contextmanager
def isolated(threads: int) -> Iterator[None]:
    """Leaves torch's global random state and thread count as they were."""
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


@dataclass(frozen=True)
class _Example:
    """Token ids of a whole chat and where its response starts."""

    ids: list[int]
    start: int


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> list[_Example]:
    """Tokenises rows through the chat template; some get a system message."""
    rng = random.Random(recipe.seed)
    prompts, responses = [], []
    for row in rows:
        chat = [{"role": "user", "content": row["prompt"]}]
        if rng.random() < recipe.system_share:
            chat.insert(0, {"role": "system", "content": rng.choice(SYSTEM_MESSAGES)})
        prompts.append(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        )
        responses.append(row["response"] + tokenizer.eos_token)
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    tails = tokenizer(responses, add_special_tokens=False)["input_ids"]
    return [_Example(head + tail, len(head)) for head, tail in zip(heads, tails, strict=True)]


def _noisy(example: _Example, recipe: Recipe, rng: random.Random) -> list[int]:
    """Replaces some prompt tokens; special tokens, which have the lowest ids, stay."""
    special = len(SPECIAL_TOKENS)
    return [
        rng.randrange(special, recipe.vocabulary)
        if place < example.start and token >= special and rng.random() < recipe.noise
        else token
        for place, token in enumerate(example.ids)
    ]


def _batches(
    examples: Sequence[_Example], recipe: Recipe, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ``ids [B, T]`` and per-token loss weights ``[B, T]``, rows of like length together.

    Padding is on the right and carries weight 0; under causal attention no real token sees it,
    so no attention mask is needed.
    """
    rng = random.Random(recipe.seed + 1)
    done = 0
    while True:
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), rng.random()))
        chunks = [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
        rng.shuffle(chunks)
        for chunk in chunks:
            if done == steps:
                return
            done += 1
            longest = max(len(examples[i].ids) for i in chunk)
            ids = torch.zeros(len(chunk), longest, dtype=torch.long)
            weights = torch.zeros(len(chunk), longest)
            for place, index in enumerate(chunk):
                example = examples[index]
                length = len(example.ids)
                ids[place, :length] = torch.tensor(_noisy(example, recipe, rng))
                weights[place, 1 : example.start] = recipe.prompt_weight
                weights[place, example.start : length] = 1.0
                weights[place, example.start] = recipe.first_weight
            yield ids, weights


def _loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean NLL of the next token; the output head sees weighted positions only."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = weights[:, 1:] > 0
    logits = model.lm_head(hidden[wanted])
    losses = functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
    chosen = weights[:, 1:][wanted]
    return (losses * chosen).sum() / chosen.sum()


def _rate(step: int, steps: int, recipe: Recipe) -> float:
    """Learning rate: linear warm-up, then a cosine down to a twentieth of the peak."""
    warmup = max(1, round(recipe.warmup * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return recipe.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def _optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def train(
    rows: Sequence[Row], recipe: Recipe, progress: bool = True, max_steps: int | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """Trains tokenizer and model from nothing.

    The result depends on the rows, the recipe and the machine's arithmetic alone: torch's global
    random state is neither read nor changed.

    Args:
        rows: Chat rows with prompt and response.
        recipe: Sizes, schedule and seed.
        progress: Show a progress bar on stderr.
        max_steps: Stop early; the schedule is fitted to this number of steps.

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
        optimizer = _optimizer(model, recipe)
        bar = tqdm(
            _batches(examples, recipe, steps),
            total=steps,
            desc="gradsafe testbed",
            unit="step",
            disable=not progress,
        )
        for step, (ids, weights) in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, steps, recipe)
            loss = _loss(model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return model.eval(), tokenizer, losses

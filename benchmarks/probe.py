"""The simplest probe: the direction from safe to unsafe references in a layer's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gradsafe.models import collate, encode, pad_token_id, plan_batches


@torch.no_grad()
def hidden_states(
    model: Any, tokenizer: Any, prompts: Sequence[str], block: int, batch_tokens: int = 4096
) -> Tensor:
    """Output `[n, d]` float32 of a decoder block at the last prompt token of every prompt."""
    items = [encode(tokenizer, prompt, "Sure") for prompt in prompts]
    found = torch.empty(len(items), model.config.hidden_size)
    batches = plan_batches([len(item) for item in items], batch_tokens)
    for indices in tqdm(batches, desc="probe", leave=False, disable=None):
        batch = collate([items[i] for i in indices], pad_token_id(tokenizer))
        output = model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        )
        last = torch.tensor(batch.prompt_lengths) - 1
        # The first entry is the output of the embedding.
        found[indices] = output.hidden_states[block + 1][torch.arange(len(last)), last].float()
    return found


class MeanDifference:
    """Scores prompts by their projection on the difference of the references' means."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        unsafe: Sequence[str],
        safe: Sequence[str],
        block: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.block = 2 * model.config.num_hidden_layers // 3 if block is None else block
        means = (hidden_states(model, tokenizer, p, self.block).mean(0) for p in (unsafe, safe))
        self.direction = next(means) - next(means)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Scores `[n]`."""
        states = hidden_states(self.model, self.tokenizer, prompts, self.block)
        return states @ self.direction

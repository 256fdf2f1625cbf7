"""A linear classifier of mean hidden states, which several experiments compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from gradsafe.models import Encoded, collate, pad_token_id, plan_batches

BATCH_TOKENS = 1024


@torch.no_grad()
def mean_states(
    model: Any, tokenizer: Any, items: Sequence[Encoded], response_only: bool = False
) -> np.ndarray:
    """Mean hidden state `[n, H]` of the middle layer over prompt and response, or the latter."""
    found = torch.empty(len(items), model.config.hidden_size)
    for indices in plan_batches([len(item) for item in items], BATCH_TOKENS):
        batch = collate([items[i] for i in indices], pad_token_id(tokenizer, model))
        states = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
            logits_to_keep=1,
        ).hidden_states
        middle = states[len(states) // 2]
        mask = batch.attention_mask.clone()
        if response_only:
            for row, (start, length) in enumerate(
                zip(batch.starts, batch.prompt_lengths, strict=True)
            ):
                mask[row, start : start + length] = 0
        found[indices] = (middle * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return found.numpy()


def probe() -> Pipeline:
    """An untrained classifier of hidden states."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))

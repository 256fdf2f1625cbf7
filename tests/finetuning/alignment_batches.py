"""Batches of the alignment tests."""

from __future__ import annotations

import builders
import torch
from torch import Tensor


def make_batch(side: str = "right", width: int = 12) -> dict[str, Tensor]:
    """Four samples of mixed length with responses of two to five tokens, -100 elsewhere."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 3), (2, 5), (7, 2), (3, 4)]  # prompt, response
    ids = torch.zeros(4, width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, response) in enumerate(shapes):
        size = prompt + response
        start = 0 if side == "right" else width - size
        tokens = torch.randint(3, builders.VOCABULARY, (size,), generator=generator)
        ids[row, start : start + size] = tokens
        mask[row, start : start + size] = 1
        labels[row, start + prompt : start + size] = tokens[prompt:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

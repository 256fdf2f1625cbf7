"""Batches by token budget, and their padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.models.encode import Encoded
from gradsafe.models.inspection import input_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group sequences of similar length under a budget of padded tokens.

    Longest first (equal lengths keep their order), greedily: the first batch is the largest, so
    that out-of-memory errors occur early. Every batch satisfies `B * T_max <= batch_tokens`, except
    that a sequence above the budget is a batch of its own.

    Args:
        lengths: Tokens of each sequence, all positive.
        batch_tokens: Budget of tokens per batch, padding included.

    Returns:
        Batches of indices into `lengths`; every index occurs once.

    Raises:
        ValueError: `batch_tokens` or a length is below 1.
    """
    if batch_tokens < 1:
        refuse("plan_batches", "batch_tokens >= 1", batch_tokens)
    for index, length in enumerate(lengths):
        if length < 1:
            refuse("plan_batches", f"lengths[{index}] >= 1", length)
    batches: list[list[int]] = []
    widest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * widest <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            widest = lengths[index]
    return batches


@dataclass
class Batch:
    """Padded token ids of B sequences, T columns.

    Attributes:
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]` int64, 1 at real tokens.
        position_ids: `[B, T]` int64, counting real tokens from 0; 0 at padding.
        lengths: Real tokens per row.
        prompt_lengths: Prompt tokens per row.
        starts: Column of each row's first real token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    lengths: list[int]
    prompt_lengths: list[int]
    starts: list[int]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        names = ("input_ids", "attention_mask", "position_ids")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def collate(
    items: Sequence[Encoded],
    pad_id: int,
    padding_side: Literal["right", "left"] = "right",
) -> Batch:
    """Pad encoded prompts to one batch on the CPU, in their order.

    Left padding puts all response tokens into the same last columns; `response_nll` then computes
    the fewest logits.

    Args:
        items: Encoded prompts, at least one.
        pad_id: Token id of the padding; masked, so any valid id will do.
        padding_side: Side of the padding.

    Raises:
        ValueError: No items, or an unknown `padding_side`.
    """
    if not items:
        refuse("collate", "at least one item", "none")
    if padding_side not in ("right", "left"):
        refuse("collate", 'padding_side="right" or "left"', repr(padding_side))
    lengths = [len(item) for item in items]
    columns = max(lengths)
    starts = [0 if padding_side == "right" else columns - length for length in lengths]
    input_ids = torch.full((len(items), columns), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    position_ids = torch.zeros_like(input_ids)
    for row, (item, start, length) in enumerate(zip(items, starts, lengths, strict=True)):
        real = slice(start, start + length)
        input_ids[row, real] = torch.tensor(item.input_ids, dtype=torch.int64)
        attention_mask[row, real] = 1
        position_ids[row, real] = torch.arange(length)
    prompt_lengths = [item.prompt_length for item in items]
    return Batch(input_ids, attention_mask, position_ids, lengths, prompt_lengths, starts)


def pad_token_id(tokenizer: PreTrainedTokenizerBase, model: Any) -> int:
    """Return an id to pad with: the pad token, else EOS, else 0 (harmless, since it is masked).

    A token that was added without a row in the embedding of the model cannot be used.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    size = input_vocabulary(model)
    return int(next(token for token in known if token is not None and token < size))

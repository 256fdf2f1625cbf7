"""Mean negative log-likelihood of the response, per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradsafe.models.batching import Batch, collate, plan_batches
from gradsafe.models.encode import Encoded
from gradsafe.models.inspection import forward_parameters, input_device
from gradsafe.models.modes import evaluating
from gradsafe.models.opening import Opening
from gradsafe.models.threads import alone


def response_nll(model: nn.Module, batch: Batch, opening: Opening | None = None) -> Tensor:
    """Compute each row's mean NLL of its response tokens (natural logarithm).

    The model's own forward runs, so family details such as logit soft-capping hold; logits are
    computed only at the positions that predict a response token of some row, where the forward
    knows `logits_to_keep`. The mean is over a row's tokens, never over the batch: summing the
    result gives every prompt the gradient it would have alone.

    Args:
        model: A causal language model, PEFT wrapper or not; spread over devices or not.
        batch: The padded batch, on any device.
        opening: Keys and values of tokens that stand before every row of the batch.

    Returns:
        `[B]` float32 (float64 where the logits are), differentiable, on the logits' device.

    Raises:
        ValueError: The model is wrapped in a prompt-learning adapter (virtual tokens).
        RuntimeError: The model returns logits for other positions than the ones fed in.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "gradsafe.response_nll: prompt-learning adapters put virtual tokens before the prompt "
            "and are not supported; use model.get_base_model() or a LoRA-like adapter"
        )
    device = input_device(model)
    if device is not None:
        batch = batch.to(device)
    positions, counts = _predicting_positions(batch)
    targets = batch.input_ids.gather(1, positions + 1)
    accepted = forward_parameters(model)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    if "position_ids" in accepted:
        inputs["position_ids"] = batch.position_ids
    if opening is not None:
        opening.precede(inputs)
    columns = batch.input_ids.shape[1]
    if "logits_to_keep" in accepted:
        kept = torch.unique(positions)
        inputs["logits_to_keep"] = kept
        positions = torch.searchsorted(kept, positions)
        columns = len(kept)
    output = model(**inputs)
    logits = output.logits if hasattr(output, "logits") else output[0]
    if logits.shape[1] != columns:
        raise RuntimeError(
            f"gradsafe.response_nll: expected {type(model).__name__} to return logits for "
            f"{columns} positions, got {logits.shape[1]}"
        )
    positions, targets, counts = (t.to(logits.device) for t in (positions, targets, counts))
    # [B, R, V]; rows with a short response repeat their first position, masked below.
    picked = logits[torch.arange(len(positions), device=logits.device)[:, None], positions]
    if picked.dtype != torch.float64:
        picked = picked.to(torch.float32)
    nll = functional.cross_entropy(picked.flatten(0, 1), targets.flatten(), reduction="none")
    nll = nll.view(positions.shape)
    real = torch.arange(positions.shape[1], device=nll.device)[None, :] < counts[:, None]
    return torch.where(real, nll, torch.zeros_like(nll)).sum(dim=1) / counts.to(nll.dtype)


def mean_nll(
    model: nn.Module, items: Sequence[Encoded], pad_id: int, batch_tokens: int = 4096
) -> Tensor:
    """Compute the mean response NLL of many rows, in eval mode and without gradients.

    Args:
        model: As in `response_nll`.
        items: Encoded rows.
        pad_id: Token id of the padding.
        batch_tokens: Tokens per batch, padding included.

    Returns:
        `[n]` float32 on the CPU, in the order of the items.
    """
    found = torch.empty(len(items))
    with alone(model), evaluating(model), torch.no_grad():
        for indices in plan_batches([len(item) for item in items], batch_tokens):
            batch = collate([items[i] for i in indices], pad_id, "left")
            found[indices] = response_nll(model, batch).float().cpu()
    return found


def _predicting_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Columns whose logits predict the response, `[B, R]`, and their number per row, `[B]`."""
    pairs = zip(batch.lengths, batch.prompt_lengths, strict=True)
    counts = [length - prompt for length, prompt in pairs]
    firsts = [a + prompt - 1 for a, prompt in zip(batch.starts, batch.prompt_lengths, strict=True)]
    columns = [
        [*range(first, first + count), *[first] * (max(counts) - count)]
        for first, count in zip(firsts, counts, strict=True)
    ]
    device = batch.input_ids.device
    return torch.tensor(columns, device=device), torch.tensor(counts, device=device)

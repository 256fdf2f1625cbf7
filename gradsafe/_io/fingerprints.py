"""Fingerprints of models and tokenizers: what was computed with one is never mixed with another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gradsafe._io.artifacts import refuse_meta

_SAMPLES = 1024  # values of one parameter that enter a model's fingerprint


def model_fingerprint(model: nn.Module, without: Collection[int] = ()) -> str:
    """SHA-256 of a model's weights: names, shapes, dtypes and at most 1,024 values of each.

    Weights are its parameters, and the buffers of its state dict, where quantised layers keep
    theirs. The values are evenly spaced, so the cost does not grow with the model, and they are
    compared as bytes, so the fingerprint is the same on every device.

    Args:
        model: Any module; weights tied under several names count once.
        without: `id` of weights that do not count.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: A weight is on the meta device, so it has no values to read.
    """
    digest = hashlib.sha256()
    saved = model.state_dict(keep_vars=True)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    for name, weight in sorted([*model.named_parameters(), *buffers], key=lambda item: item[0]):
        if id(weight) in without:
            continue
        refuse_meta(weight, f"weight {name!r}", "load the weights before fingerprinting")
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(_sampled_bytes(weight.detach()))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides how a tokenizer encodes a chat: template, vocabulary, specials.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Returns:
        64 hexadecimal digits.
    """
    facts = {
        "chat_template": getattr(tokenizer, "chat_template", None),
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special_tokens": tokenizer.special_tokens_map,
    }
    text = json.dumps(facts, sort_keys=True, default=str)  # str: AddedToken objects
    return hashlib.sha256(text.encode()).hexdigest()


def _sampled_bytes(values: Tensor) -> bytes:
    if is_traceable_wrapper_subclass(values) and not hasattr(values, "full_tensor"):
        # Quantised weights (torchao) hold codes and scales, and need not support indexing.
        names, _ = values.__tensor_flatten__()  # type: ignore[attr-defined]
        return b"".join(_sampled_bytes(getattr(values, name)) for name in names)
    count = values.numel()
    if values.element_size() == 1:  # fp8 has no indexing kernel everywhere
        values = values.view(torch.uint8)
    picks = torch.arange(min(count, _SAMPLES), dtype=torch.int64)
    picks = picks * count // max(1, len(picks))
    if values.ndim:  # indexing by coordinates copies no parameter, whatever its strides
        where = torch.unravel_index(picks.to(values.device), tuple(values.shape))
        values = values[where]
    sample = values.reshape(-1).contiguous().cpu()
    return bytes(sample.view(torch.uint8).numpy())

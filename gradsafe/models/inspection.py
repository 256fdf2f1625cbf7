"""Facts about a model that do not depend on its family: config, forward signature, input device."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradsafe._checks import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers without a known limit report about 1e30.
_LARGEST_LENGTH = 10**9


def base_model(model: nn.Module) -> nn.Module:
    """Return the transformers model behind `torch.compile` and PEFT wrappers, or `model` itself."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and callable(getattr(model, "get_base_model", None)):
            inner = model.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, `torch.compile` and PEFT wrappers."""
    while True:
        module = getattr(model, "module", None)
        inner = base_model(module if isinstance(module, nn.Module) else model)
        if inner is model:
            return model
        model = inner


def text_config(model: nn.Module) -> Any:
    """Return the config of the text decoder (multimodal configs hold several).

    Raises:
        ValueError: The model has no `config`.
    """
    config = getattr(base_model(model), "config", None)
    if config is None:
        refuse("models", "model to be a transformers model with a config", type(model).__name__)
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def context_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return how many tokens the model can read at once, or None where this is unknown.

    The smaller of the text config's `max_position_embeddings` (or `n_positions`) and the
    tokenizer's `model_max_length`; values of 10^9 and more mean unknown.
    """
    config = text_config(model)
    limits = [
        getattr(config, "max_position_embeddings", None),
        getattr(config, "n_positions", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < _LARGEST_LENGTH]
    return min(known, default=None)


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names that the forward of the (unwrapped) model declares explicitly."""
    return frozenset(inspect.signature(base_model(model).forward).parameters)


def input_vocabulary(model: Any) -> float:
    """How many token ids the input embedding of a model holds; Inf where that is unknown."""
    base: Any = base_model(model)
    try:
        embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    except NotImplementedError:  # a model without one
        embedding = None
    embedding = getattr(embedding, "base_layer", embedding)
    weight = getattr(embedding, "weight", None)
    size = getattr(embedding, "num_embeddings", None) or (len(weight) if weight is not None else 0)
    return size or math.inf


def check_token_ids(where: str, model: nn.Module, ids: Sequence[int], names: Sequence[str]) -> None:
    """Raise ValueError if one of the prompts has a token that the model does not know.

    Args:
        where: Public name that the message begins with.
        model: The model.
        ids: The largest token id of each prompt.
        names: What messages call the prompts.
    """
    size = input_vocabulary(model)
    for largest, name in zip(ids, names, strict=True):
        if largest >= size:
            got = f"id {largest} in {name}"
            do = "use the model's own tokenizer, or resize the model's embeddings"
            refuse(where, f"token ids below {size}, the size of the input embedding", got, do)


def input_device(model: nn.Module) -> torch.device | None:
    """Return the device of the input embedding, where token ids must go.

    None where the embedding is offloaded ("meta"): accelerate's own hooks move the inputs then.
    """
    base: Any = base_model(model)
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else base
    parameter = next(embedding.parameters(), None) if isinstance(embedding, nn.Module) else None
    if parameter is None:
        parameter = next(base.parameters(), None)
    if parameter is None or parameter.device.type == "meta":
        return None
    return parameter.device

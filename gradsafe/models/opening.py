"""Tokens that many prompts begin with: they run once, and leave their keys and values."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gradsafe.models.compat import cache_argument, is_recurrent, returned_cache
from gradsafe.models.inspection import base_model, forward_parameters, input_device


class Opening:
    """The keys and values of `ids`, which stand before every row of a batch.

    They are constants: no gradient flows into them. Causal attention makes them the same as in a
    pass over whole sequences, up to rounding.

    Args:
        model: A model for which `obstacle` is None, in eval mode.
        ids: Token ids.

    Raises:
        RuntimeError: The model returns no cache that can be repeated for a batch.
    """

    def __init__(self, model: nn.Module, ids: Sequence[int]) -> None:
        accepted = forward_parameters(model)
        name = cache_argument(accepted)
        assert name is not None
        self.name, self.length = name, len(ids)
        kept = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        tokens = torch.tensor([ids], device=input_device(model))
        with torch.no_grad():
            output = model(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True, **kept
            )
        self.cache = returned_cache(output)
        if not hasattr(self.cache, "batch_repeat_interleave"):
            raise RuntimeError(
                f"gradsafe.Detector: {type(base_model(model)).__name__} returns no cache of keys "
                'and values that can be repeated; leave out prefix="cut"'
            )

    def precede(self, inputs: dict[str, Any]) -> None:
        """Put the opening before the rows of a forward pass whose arguments these are."""
        rows = len(inputs["input_ids"])
        cache = copy.deepcopy(self.cache)  # the forward pass appends to it
        cache.batch_repeat_interleave(rows)
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([mask.new_ones(rows, self.length), mask], dim=1)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + self.length
        inputs |= {self.name: cache, "use_cache": True}


def obstacle(model: nn.Module) -> str | None:
    """Why no opening can be computed in advance for a model, or None."""
    if cache_argument(forward_parameters(model)) is None:
        return "its forward takes no cache of keys and values"
    if is_recurrent(base_model(model)):
        return "it carries a recurrent state, which cannot continue by several tokens"
    return None

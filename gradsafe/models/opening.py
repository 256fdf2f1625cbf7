"""Tokens that many prompts begin with: they run once, and leave their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.models.compat import cache_argument, is_recurrent, returned_cache
from gradsafe.models.inspection import base_model, forward_parameters, input_device


class Opening:
    """The keys and values of `ids`, which stand before every row of a batch.

    They are constants: no gradient flows into them. Causal attention makes them the same as in a
    pass over whole sequences, up to rounding. They are stored once, whatever the batch: a pass
    reads them and adds nothing, so that no layer's keys and values outlive the layer.

    Args:
        model: A model for which `obstacle` is None, in eval mode.
        ids: Token ids.

    Raises:
        RuntimeError: The model returns no cache of keys and values of attention alone.
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
        layers = getattr(self.cache, "layers", None) or []
        if not layers or not all(map(_is_plain, layers)):
            raise RuntimeError(
                f"gradsafe.models: {type(base_model(model)).__name__} returns no cache that holds "
                "keys and values alone"
            )
        for layer in layers:
            layer.update = partial(_behind, layer.keys, layer.values)

    def precede(self, inputs: dict[str, Any]) -> None:
        """Put the opening before the rows of a forward pass whose arguments these are."""
        rows = len(inputs["input_ids"])
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([mask.new_ones(rows, self.length), mask], dim=1)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + self.length
        inputs |= {self.name: self.cache, "use_cache": True}


def _is_plain(layer: Any) -> bool:
    """Whether a cache's layer holds keys and values `[1, H, P, D]` and nothing else."""
    state = {name: v for name, v in vars(layer).items() if isinstance(v, Tensor) and v.ndim}
    plain = all(value.ndim == 4 and len(value) == 1 for value in state.values())
    return plain and state.keys() == {"keys", "values"}


def _behind(
    first_keys: Tensor, first_values: Tensor, keys: Tensor, values: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """What a layer's `update` returns, without the update: keys and values `[B, H, P + T, D]`.

    A layer with a sliding window has dropped what lies outside of it.
    """
    first = (a.expand(len(b), -1, -1, -1) for a, b in ((first_keys, keys), (first_values, values)))
    return torch.cat([next(first), keys], 2), torch.cat([next(first), values], 2)


def obstacle(model: nn.Module) -> str | None:
    """Why no opening can be computed in advance for a model, or None."""
    if cache_argument(forward_parameters(model)) is None:
        return "its forward takes no cache of keys and values"
    if is_recurrent(base_model(model)):
        return "it carries a recurrent state, which cannot continue by several tokens"
    kinds = {str(getattr(module, "rope_type", "")) for module in model.modules()}
    if any(name in kind for kind in kinds for name in ("dynamic", "longrope")):
        return "the rotation of its keys depends on the length of the whole text"
    return None

"""Finds the decoder's list of blocks by its place and content, not by its name."""

from __future__ import annotations

from torch import nn

from gradsafe.models.inspection import base_model, text_config
from gradsafe.models.linear import linear_shape, without_adapters


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's blocks: one member per hidden layer, holding the most linear weights.

    Args:
        model: A causal language model, PEFT wrapper or not. A list under `model.get_decoder()` is
            preferred, so a vision tower of the same depth is not mistaken for the decoder.

    Raises:
        ValueError: The config gives no number of layers, or no list of modules fits it.
    """
    base = base_model(model)
    depth = getattr(text_config(model), "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(
            f"gradsafe.find_layers: the config of {type(base).__name__} has no num_hidden_layers; "
            f"a decoder-only language model is needed"
        )
    found = _lists(base, depth)
    if not found:
        lengths = sorted({len(m) for m in base.modules() if isinstance(m, nn.ModuleList)})
        raise ValueError(
            f"gradsafe.find_layers: {type(base).__name__} has no nn.ModuleList of its "
            f"num_hidden_layers={depth} blocks (lengths found: {lengths or 'none'})"
        )
    try:
        decoder = base.get_decoder()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        decoder = None  # the method is missing, or only declared: the whole model is searched
    inside = _lists(decoder, depth) if isinstance(decoder, nn.Module) else []
    return max(inside or found, key=_linear_weights)


def head_dimension(model: nn.Module) -> int | None:
    """Return the size of one attention head, or None where the config does not say."""
    config = text_config(model)
    try:
        explicit = getattr(config, "head_dim", None)
    except RuntimeError:  # raised by configs whose blocks have heads of different sizes
        return None
    if isinstance(explicit, int):
        return explicit
    hidden = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _lists(module: nn.Module, depth: int) -> list[nn.ModuleList]:
    """Lists of `depth` modules, outermost only: a block may hold a list of as many experts.

    Without one, lists whose length divides `depth`: such a block is several layers, or runs again.
    """
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m)]
    found = [m for m in lists if len(m) == depth] or [
        m for m in lists if len(m) > 1 and depth % len(m) == 0
    ]
    nested = {id(inner) for outer in found for inner in outer.modules() if inner is not outer}
    return [m for m in found if id(m) not in nested]


def _linear_weights(blocks: nn.ModuleList) -> int:
    shapes = [linear_shape(m) for block in blocks for _, m in without_adapters(block)]
    return sum(shape[0] * shape[1] for shape in shapes if shape is not None)

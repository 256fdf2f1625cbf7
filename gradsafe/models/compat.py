"""Differences between versions of other libraries, found by feature, never by version number.

`constraints/lowest.txt` names the oldest versions; a difference that they no longer have is removed
here.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Names of the same thing, the current one first.
_CACHE = ("cache", "past_key_values")  # transformers 5.24 took the first
_CHECKPOINTING_FLAG = ("activation_checkpointing", "gradient_checkpointing")
_RENAMED_TRAINING_OPTIONS = (
    _CHECKPOINTING_FLAG,
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)

#: Attributes that hold a linear layer's (in, out) sizes; older GPTQ kernels have the second pair.
LINEAR_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))


def cache_argument(accepted: Collection[str]) -> str | None:
    """Return the name by which a forward takes the keys and values of earlier tokens, or None.

    Args:
        accepted: Names that the forward declares, from `forward_parameters`.
    """
    return next((name for name in _CACHE if name in accepted), None)


def is_recurrent(model: nn.Module) -> bool:
    """Whether a transformers model carries a recurrent state, alone or beside keys and values."""
    return bool(getattr(model, "_is_stateful", False))


def returned_cache(output: Any) -> Any:
    """Return the cache in a model's output, or None."""
    # Outputs with the new name also have the old one, which warns.
    name = next((name for name in _CACHE if hasattr(output, name)), None)
    return None if name is None else getattr(output, name)


def checkpointing_flag(module: nn.Module) -> bool | None:
    """Return whether a module checkpoints its activations; None where it has no such flag."""
    found = [getattr(module, name) for name in _CHECKPOINTING_FLAG if hasattr(module, name)]
    return any(flag is True for flag in found) if found else None


def hooks_inside_checkpoint(block: nn.Module) -> bool:
    """Whether a block that checkpoints itself runs its own hooks within the checkpoint.

    transformers checkpointed the block's `__call__` before it checkpointed its `forward`.
    """
    return type(block).__call__ is not nn.Module.__call__


def has_gate(experts: Any) -> bool | None:
    """Whether a fused experts module has a gate beside its up projection; None for other modules.

    transformers sets these flags where it puts an experts class behind its interface; the first
    release of the interface knew gated experts only and has no flag for that.
    """
    flags = ("is_transposed", "has_bias", "_apply_gate")
    if not all(hasattr(experts, flag) for flag in flags):
        return None
    return bool(getattr(experts, "has_gate", True))


def enable_checkpointing(model: Any, **options: Any) -> None:
    """Switch activation checkpointing on, with options of `torch.utils.checkpoint.checkpoint`.

    Does not ask for the method by a deprecated name, which would warn.
    """
    names = [f"{name}_enable" for name in _CHECKPOINTING_FLAG]
    getattr(model, next(name for name in names if hasattr(model, name)))(options or None)


@contextmanager
def differentiable_layouts(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit weights of bitsandbytes in the layout whose product has a backward pass.

    On processors with AVX512-BF16, a forward pass without gradients packs them in place for a
    kernel without backward pass: later gradients silently stop at such a layer. Packed weights are
    unpacked.
    """
    flag = "support_avx512bf16_for_cpu"
    layers = [module for module in model.modules() if getattr(module, flag, False)]
    try:
        for layer in layers:
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):  # type: ignore[union-attr]
                layer.state_dict()  # a layer unpacks its weight to save it
            setattr(layer, flag, False)
        yield
    finally:
        for layer in layers:
            setattr(layer, flag, True)


@contextmanager
def quiet_renames() -> Iterator[None]:
    """Hide the warning that PEFT causes by asking transformers for a deprecated name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is dep", FutureWarning)
        yield


def training_option(name: str, accepted: Collection[str]) -> str:
    """Return the name of an option in the installed `TrainingArguments`.

    Args:
        name: An older or newer name of it; any other name is returned as it is.
        accepted: Fields of the `TrainingArguments`.
    """
    for names in _RENAMED_TRAINING_OPTIONS:
        if name in names:
            return next((known for known in names if known in accepted), name)
    return name


def static_graph(args: Any) -> bool:
    """Whether training arguments declare DDP's graph static; older ones have no such option."""
    return bool(getattr(args, "ddp_static_graph", False))


def loaded_sharded(trainer: Any) -> bool:
    """Whether transformers sharded the trainer's model while loading it; older ones cannot."""
    return bool(getattr(trainer, "is_distributed_loading_by_transformers", False))

"""Temporary model states: frozen weights, dropout off, checkpointing still on.

All threads see these states, so whoever asks for one holds `threads.alone(model)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from gradsafe.models.compat import checkpointing_flag, differentiable_layouts


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn `requires_grad` off for all parameters; restore every flag at the end."""
    # By module and name, not by object: offloading replaces parameter objects.
    flags = [
        (module, name, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    try:
        for module, name, _ in flags:
            getattr(module, name).requires_grad_(False)
        yield
    finally:
        for module, name, flag in flags:
            getattr(module, name).requires_grad_(flag)


@contextmanager
def evaluating(model: nn.Module, checkpointed: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Put the model in eval mode, except the own flag of `checkpointed`; restore all at the end.

    transformers checkpoints a block only while that block is in training mode. Only the block's own
    flag is raised, its submodules stay in eval mode. A forward pass of another thread then may
    checkpoint too: its results are the same, but some versions of transformers drop its cache.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module in checkpointed:
            module.training = True
        with differentiable_layouts(model):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def checkpointing_modules(model: nn.Module, blocks: nn.ModuleList, start: int) -> list[nn.Module]:
    """Return the modules whose training flag keeps activation checkpointing active.

    These are the blocks from `start` on that checkpoint themselves, or, in families that
    checkpoint from the decoder's loop, the module that owns the blocks. None where checkpointing is
    off, or where the flag would switch on a dropout that the module applies itself (with a
    warning).
    """
    modules = [m for m in blocks[start:] if checkpointing_flag(m)]
    if not modules and all(checkpointing_flag(m) is None for m in blocks):
        owner = decoder_loop(model, blocks)
        modules = [owner] if checkpointing_flag(owner) else []
    for module in modules:
        dropout = _own_dropout(module)
        if dropout is not None:
            warnings.warn(
                f"gradsafe.capture: activation checkpointing is off inside the capture, since the "
                f"training mode of {type(module).__name__} would also switch on its {dropout}; "
                f"set that to 0 to save memory",
                stacklevel=2,
            )
            return []
    return modules


def decoder_loop(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """Return the module whose child the list of blocks is."""
    for module in model.modules():
        if any(child is blocks for child in module.children()):
            return module
    raise ValueError(
        f"gradsafe.capture: layers do not belong to this {type(model).__name__}; "
        f"call find_layers(model) on the model that runs"
    )


def _own_dropout(module: nn.Module) -> str | None:
    """Name of a positive dropout rate that acts on the module's own training flag, if any."""
    # A decoder's config lists the rates of its blocks, which act on flags further down.
    holds_blocks = any(isinstance(child, nn.ModuleList) for child in module.children())
    config = None if holds_blocks else getattr(module, "config", None)
    for source, values in (("", vars(module)), ("config.", vars(config) if config else {})):
        for name, value in values.items():
            if "drop" in name.lower() and isinstance(value, float) and value > 0:
                return f"{source}{name}={value}"
    return None

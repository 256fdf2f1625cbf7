"""Schemas and fake kernels of the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from gradsafe._backend import _C

#: Every schema, by name.
SCHEMAS: dict[str, str] = {}
_library = torch.library.Library("gradsafe", "FRAGMENT")  # kept: its registrations end with it


def operator(
    schema: str, *, differentiable: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the fake kernel of an operator.

    Defines the schema where the compiled module, which defines it itself, is not in use.

    Args:
        schema: As in csrc/torch/operators.cpp.
        differentiable: If False, a backward pass raises an error that says to detach.
    """
    name = schema.partition("(")[0]
    SCHEMAS[name] = schema
    if _C is None:
        _library.define(schema)

    def refuse_backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"gradsafe.{name} is not differentiable; detach the tensors you pass to it"
        )

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"gradsafe::{name}", fake)
        if not differentiable:
            torch.library.register_autograd(f"gradsafe::{name}", refuse_backward)
        return fake

    return register

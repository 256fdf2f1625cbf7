"""Sees the products of weights that are used by name and not by calling their module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gradsafe.models.linear import linear_shape

_RIGHT = {  # functions of (x, W) with W [..., I, O]
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
}
_CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}


@dataclass(frozen=True)
class Product:
    """One product with a weight, or with a part of it.

    Attributes:
        first: Index of the first matrix, counted in matrices of this size from the weight's start.
        matrices: Matrices in the product; several for a batched one, `[matrices, N, I]`.
        stack: Matrices in the whole weight.
        out_features: O.
        in_features: I.
        transposed: Whether the weight stores `[I, O]`.
    """

    first: int
    matrices: int
    stack: int
    out_features: int
    in_features: int
    transposed: bool


# observe(key, product, x, output) returns the output; product None for one that is not understood.
Observe = Callable[[str, Product | None, Tensor, Tensor], Tensor]


class Products(TorchFunctionMode):
    """While active, calls `observe` for every product with one of the weights.

    Args:
        weights: Key, module and parameter name of each; looked up at every product, since
            offloading replaces parameter objects.
        observe: Sees x `[..., I]` and the output `[..., O]`, and returns what to go on with.
    """

    def __init__(self, weights: Sequence[tuple[str, nn.Module, str]], observe: Observe) -> None:
        super().__init__()
        self.weights = weights
        self.observe = observe
        self._depth = 0
        self._casts: list[tuple[str, Tensor]] = []

    def enter(self, *_: Any) -> None:
        """Activate, unless it is already; a forward pre-hook."""
        if self._depth == 0:
            self.__enter__()
        self._depth += 1

    def leave(self, *_: Any) -> None:
        """Undo one `enter`; a forward hook."""
        self._depth -= 1
        if self._depth == 0:
            self.__exit__(None, None, None)
            self._casts.clear()

    def remove(self) -> None:
        """Deactivate for good; forward hooks do not run after a KeyboardInterrupt."""
        if self._depth:
            self._depth = 1
            self.leave()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.linear and len(args) >= 2 and self._find(args[1]) is not None:
            return self._seen(args[0], args[1].transpose(-1, -2), output)
        if func in _RIGHT and len(args) == 2:
            if self._find(args[1]) is not None:
                return self._seen(args[0], args[1], output)
            if self._find(args[0]) is not None:  # W x^T is (x W^T)^T
                x, matrix = args[1].transpose(-1, -2), args[0].transpose(-1, -2)
                return self._seen(x, matrix, output.transpose(-1, -2)).transpose(-1, -2)
        if func is torch.baddbmm and len(args) == 3:
            return self._seen(args[1], args[2], output)
        if func is torch.einsum and len(args) == 3 and self._find(args[2]) is not None:
            return self._contracted(args[0], args[1], args[2], output)
        if func in _CASTS and output is not args[0]:
            found = self._find(args[0])
            if found is not None:
                self._casts.append((found[0], output))
        return output

    def _contracted(self, equation: str, x: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        """An einsum that is a product once axes side by side are taken as one."""
        inputs, _, result = equation.replace(" ", "").partition("->")
        left, _, right = inputs.partition(",")
        shared = [axis for axis in right if axis in left and axis not in result]
        kept = [axis for axis in right if axis not in shared]
        lead = [axis for axis in left if axis not in shared]
        plain = list(left) == lead + shared and list(result) == lead + kept
        cols = [x.shape[left.index(axis)] for axis in shared]
        if not plain or list(right) not in (shared + kept, kept + shared):
            return output
        matrix = weight.reshape(-1, math.prod(cols)) if list(right) == kept + shared else None
        matrix = weight.reshape(math.prod(cols), -1) if matrix is None else matrix.t()
        flat = output.flatten(len(lead))
        return self._seen(x.flatten(len(lead)), matrix, flat).view(output.shape)

    def _find(self, value: Any) -> tuple[str, Tensor] | None:
        # Quantised tensors of torchao wrap others and have no storage of their own.
        if not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value):
            return None
        storage = value.untyped_storage().data_ptr()
        for key, module, leaf in self.weights:
            weight = getattr(module, leaf)
            if is_traceable_wrapper_subclass(weight):
                continue
            if weight.untyped_storage().data_ptr() == storage:
                return key, weight
        for key, weight in self._casts:
            if weight.untyped_storage().data_ptr() == storage:
                return key, weight
        return None

    def _seen(self, x: Any, matrix: Tensor, output: Tensor) -> Tensor:
        found = self._find(matrix)
        if found is None:
            return output
        key, weight = found
        return self.observe(key, _product(matrix, weight), x, output)


def watch(
    weights: Iterable[tuple[str, nn.Module, str, nn.Module]], observe: Observe
) -> Iterator[Any]:
    """Register hooks under which `observe` sees the products of these weights.

    Yields what has a method `remove`: handles of hooks, and the mode that they switch.

    A weight of a plain container is used in the forward of its module, that of a linear layer in
    the forward of either the layer or the module around it.

    Args:
        weights: Key, module, parameter name and the module around it.
        observe: See `Products`.
    """
    groups: dict[int, tuple[list[tuple[str, nn.Module, str]], dict[int, nn.Module]]] = {}
    for key, module, leaf, around in weights:
        entries = [module, around] if linear_shape(module) is not None else [module]
        group, modules = groups.setdefault(id(entries[-1]), ([], {}))
        group.append((key, module, leaf))
        modules.update((id(entry), entry) for entry in entries)
    for group, modules in groups.values():
        mode = Products(group, observe)
        yield mode
        for module in modules.values():
            yield module.register_forward_pre_hook(mode.enter, prepend=True)
            yield module.register_forward_hook(mode.leave, always_call=True)


def _product(matrix: Tensor, weight: Tensor) -> Product | None:
    """Recognise `[..., I, O]` as matrices of the weight; None where it is something else."""
    if matrix.ndim not in (2, 3) or not weight.is_contiguous():
        return None
    cols, rows = matrix.shape[-2:]
    size = rows * cols
    offset = matrix.storage_offset() - weight.storage_offset()
    strides = matrix.stride()[-2:]
    if strides == (1, cols):
        transposed = False
    elif strides == (rows, 1):
        transposed = True
    else:
        return None
    several = matrix.ndim == 3 and matrix.shape[0] > 1
    if not size or offset % size or weight.numel() % size or (several and matrix.stride(0) != size):
        return None
    matrices = matrix.shape[0] if matrix.ndim == 3 else 1
    return Product(offset // size, matrices, weight.numel() // size, rows, cols, transposed)

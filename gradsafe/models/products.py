"""Sees how weights are used: calls of linear modules, and products with weights by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gradsafe.models.candidates import Candidate, LinearLayer
from gradsafe.models.linear import linear_shape
from gradsafe.models.threads import own

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


W = TypeVar("W", bound=Candidate | LinearLayer)


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


def watch_calls(
    weights: Iterable[W], observe: Callable[[W, nn.Module, Tensor | None, Any], Any]
) -> Iterator[Any]:
    """Register hooks on the modules of these weights and their twins; yields the handles.

    `observe(weight, module, x, output)` sees the first tensor among the inputs, None without one,
    and returns the output to continue with.
    """

    def hook(weight: W, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        return observe(weight, module, x, output)

    for weight in weights:
        modules: list[nn.Module] = [weight.module, *weight.twins]
        for module in modules:
            yield module.register_forward_hook(own(partial(hook, weight)), with_kwargs=True)


def watch_products(
    weights: Iterable[W], observe: Callable[[W, Product | None, Tensor, Tensor], Tensor]
) -> Iterator[Any]:
    """Register hooks under which `observe` sees every product with one of these weights.

    `observe(weight, product, x, output)` sees x `[..., I]` and the output `[..., O]` and returns
    the output to continue with; `product` is None where it is not understood.

    Yields objects with a method `remove`: handles of hooks, and the mode that they switch. A weight
    of a plain container is used in the forward of its module, the weight of a linear layer in the
    forward of either the layer or the module around it.
    """
    groups: dict[int, tuple[list[W], dict[int, nn.Module]]] = {}
    for weight in weights:
        entries = [weight.module]
        if linear_shape(weight.module) is not None and weight.around is not None:
            entries.append(weight.around)
        group, modules = groups.setdefault(id(entries[-1]), ([], {}))
        group.append(weight)
        modules.update((id(entry), entry) for entry in entries)
    for group, modules in groups.values():
        mode = _Products(group, observe)
        yield mode
        for module in modules.values():
            yield module.register_forward_pre_hook(own(mode.enter), prepend=True)
            yield module.register_forward_hook(own(mode.leave), always_call=True)


class _Products(TorchFunctionMode):
    """While active, calls `observe` for every product with one of the weights."""

    def __init__(self, weights: Sequence[Any], observe: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.observe = observe
        self._depth = 0
        self._casts: list[tuple[Any, Tensor]] = []

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
        """An einsum that is a product after neighbouring axes are merged."""
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

    def _find(self, value: Any) -> tuple[Any, Tensor] | None:
        """The weight whose memory a tensor has, and that memory as the weight stores it."""
        # Quantised tensors of torchao wrap others and have no storage of their own.
        if not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value):
            return None
        storage = value.untyped_storage().data_ptr()
        # Looked up at every product, since offloading replaces parameter objects.
        stored = ((weight, getattr(weight.module, weight.parameter)) for weight in self.weights)
        for weight, tensor in (*stored, *self._casts):
            if is_traceable_wrapper_subclass(tensor):
                continue
            if tensor.untyped_storage().data_ptr() == storage:
                return weight, tensor
        return None

    def _seen(self, x: Any, matrix: Tensor, output: Tensor) -> Tensor:
        found = self._find(matrix)
        if found is None:
            return output
        weight, stored = found
        return self.observe(weight, _product(matrix, stored), x, output)


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

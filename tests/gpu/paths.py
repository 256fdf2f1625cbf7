"""Which path through the kernels a call takes: the kernels' names and the loads they can use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradsafe._backend import _C

BORDER = 16  # bytes: the widest load


def on_borders(tensor: Tensor) -> bool:
    """Whether every row starts on a 16-byte border."""
    sizes = zip(tensor.stride()[:-1], tensor.shape, strict=False)
    strides = [stride * tensor.element_size() for stride, count in sizes if count > 1]
    return tensor.data_ptr() % BORDER == 0 and all(s % BORDER == 0 for s in strides)


def loads(tensors: Sequence[Tensor], flat: bool = False) -> str:
    """Dtype of a list, and whether its rows start on borders: all, none or some of them.

    `flat`: the operator knows no rows, a tensor is one long row.
    """
    some = {on_borders(t.reshape(-1) if flat else t) for t in tensors if t.numel()}
    kind = {(True,): "16 bytes", (False,): "single"}.get(tuple(some), "mixed")
    return f"{str(tensors[0].dtype).removeprefix('torch.')} {kind}"


class Paths(TorchDispatchMode):
    """Collects, while it is active, the paths of every call of a gradsafe operator in `taken`.

    A path is one launched kernel with its template arguments, the operator, the axis, and the dtype
    and alignment of each argument: what the kernels choose their code by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "gradsafe":
            return func(*args, **(kwargs or {}))
        _C.set_launch_log(True)
        try:
            result = func(*args, **(kwargs or {}))
            kernels = set(_C.launch_log())
        finally:
            _C.set_launch_log(False)
        facts: list[str] = []
        flat = "surgery" in func.__name__
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.name == "axis":
                facts.append(f"axis {value}")
            elif isinstance(value, Tensor) and value.dim() > 0:
                facts.append(f"{argument.name} {loads([value], flat)}")
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
                facts.append(f"{argument.name} {loads(value, flat)}")
        self.taken |= {(func.__name__, *facts, kernel) for kernel in kernels}
        return result

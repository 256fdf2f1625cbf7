"""Argument checks that the operators share. They run before anything reaches the backend."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from operator import attrgetter

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradsafe._backend import cuda_problem
from gradsafe._checks import refuse

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REF_DTYPES = (*FLOAT_DTYPES, torch.float8_e4m3fn)
_STORAGE = attrgetter("layout", "is_nested")
_KIND = attrgetter("dtype", "device")
_SHAPE_AND_KIND = attrgetter("shape", "dtype", "device")


def check_tensor(op: str, name: str, value: object) -> None:
    """A dense tensor without a tangent of forward-mode differentiation, which would be lost."""
    if not isinstance(value, Tensor):
        refuse(op, f"{name} to be a tensor", type(value).__name__, kind=TypeError)
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else value.layout
        refuse(op, f"{name} to be dense", got, kind=TypeError)
    if in_forward_mode() and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"gradsafe.{op}: expected {name} without a tangent, got one of forward-mode "
            "differentiation (jvp), which is not implemented"
        )


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def check_tensor_list(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """A list (or tuple) that holds tensors only."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        got, do = type(tensors).__name__, "put a single tensor into a list"
        refuse(op, f"{name} to be a list of tensors", got, do, TypeError)
    for index, tensor in enumerate(tensors):
        check_tensor(op, f"{name}[{index}]", tensor)


def check_same_length(op: str, name: str, tensors: Sequence[Tensor], like: str, count: int) -> None:
    """As many tensors as another list holds."""
    if len(tensors) != count:
        refuse(op, f"{name} to hold {count} tensors like {like}", len(tensors))


def check_ints(op: str, name: str, values: Sequence[int]) -> None:
    """A list of whole numbers, not a tensor: the backend needs the values on the host."""
    if isinstance(values, Tensor):
        do = f"they are needed on the host, pass {name}.tolist()"
        refuse(op, f"{name} to be a list of ints", "a tensor", do, TypeError)
    if isinstance(values, str) or not isinstance(values, Sequence):
        refuse(op, f"{name} to be a list of ints", type(values).__name__, kind=TypeError)
    for index, value in enumerate(values):
        check_int(op, f"{name}[{index}]", value)


def check_int(op: str, name: str, value: int) -> None:
    """A whole number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        refuse(op, f"{name} to be an int", type(value).__name__, kind=TypeError)


def check_bool(op: str, name: str, value: bool) -> None:
    """True or False."""
    if not isinstance(value, bool):
        refuse(op, f"{name} to be True or False", repr(value), kind=TypeError)


def check_number(op: str, name: str, value: float, below: float = math.inf) -> None:
    """A finite number, not negative."""
    if isinstance(value, bool) or not isinstance(value, Real):
        got = "a tensor" if isinstance(value, Tensor) else repr(value)
        refuse(op, f"{name} to be a number", got, kind=TypeError)
    if not 0 <= value < below or value > sys.float_info.max:
        limit = "to be finite and >= 0" if below == math.inf else f"at least 0 and below {below}"
        refuse(op, f"{name} {limit}", value)


def are_alike(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: torch.device
) -> bool:
    """Whether all are dense matrices of one of the dtypes, the same for all, on one device.

    One quick look at a long list, without Python code for each tensor; only if it fails, the checks
    below look for the argument to name. It costs 0.2 us for each tensor in place of 2.
    """
    if not tensors:
        return True
    if not are_plain(tensors):
        return False
    kinds = set(map(_KIND, tensors))
    dtype, place = next(iter(kinds))
    return (
        len(kinds) == 1
        and dtype in dtypes
        and place == device
        and set(map(Tensor.dim, tensors)) == {2}
        and (
            (all(map(Tensor.numel, tensors)) and all(map(Tensor.is_contiguous, tensors)))
            or all(t.stride(1) == 1 or t.shape[1] <= 1 for t in tensors)
        )
    )


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are dense tensors and no subclass, without a tangent, outside of a compiler."""
    return (
        not torch.compiler.is_compiling()
        and not in_forward_mode()
        and set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}
        and set(map(_STORAGE, tensors)) <= {(torch.strided, False)}
    )


def are_twins(dtypes: Sequence[torch.dtype], *lists: Sequence[Tensor]) -> bool:
    """Whether lists of contiguous tensors agree in shape and dtype, all on one device.

    A quick look as in `are_alike`; dtypes may differ within a list.
    """
    if not all(isinstance(tensors, (list, tuple)) and are_plain(tensors) for tensors in lists):
        return False
    facts = [list(map(_SHAPE_AND_KIND, tensors)) for tensors in lists]
    kinds = {fact[1:] for fact in facts[0]}
    return (
        all(other == facts[0] for other in facts[1:])
        and {dtype for dtype, _ in kinds} <= set(dtypes)
        and len({device for _, device in kinds}) <= 1
        and all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists)
    )


def check_shape(op: str, name: str, tensor: Tensor, shape: str) -> None:
    """As many dimensions as a text such as "[O, I]" names."""
    if tensor.dim() != shape.count(",") + 1:
        refuse(op, f"{name} of shape {shape}", list(tensor.shape))


def check_matrix(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    shape: str = "[O, I]",
) -> None:
    """A dense matrix of one of the dtypes whose rows are unbroken in memory."""
    check_shape(op, name, tensor, shape)
    check_rows(op, name, tensor, dtypes)


def check_rows(
    op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    """A dense matrix, or stack of matrices, of one of the dtypes with rows unbroken in memory."""
    check_dense(op, name, tensor, dtypes)
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        expected = f"{name} with unit stride along its last dimension"
        refuse(op, expected, f"strides {list(tensor.stride())}", "call .contiguous() first")


def check_dense(
    op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
) -> None:
    """Of one of the dtypes that the operator takes there (`check_tensor`: and dense)."""
    if tensor.dtype not in dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        expected = f"{name} of dtype {', '.join(most)}{' or ' if most else ''}{last}"
        refuse(op, expected, tensor.dtype, kind=TypeError)


def is_unbroken(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in whatever order of dimensions."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def check_twin(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same shape, strides, dtype and device as another argument."""
    if tensor.shape != other.shape:
        expected = f"{name} of shape {list(other.shape)} like {other_name}"
        refuse(op, expected, list(tensor.shape))
    if not (tensor.is_contiguous() and other.is_contiguous()) and tensor.numel():
        pairs = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
        if any(size > 1 and a != b for size, a, b in pairs):
            expected = f"{name} with strides {list(other.stride())} like {other_name}"
            refuse(op, expected, list(tensor.stride()), "bring both into one layout first")
    check_like(op, name, tensor, other_name, other)


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device as another argument."""
    if tensor.dtype != other.dtype:
        expected = f"{name} of dtype {other.dtype} like {other_name}"
        refuse(op, expected, tensor.dtype, kind=TypeError)
    check_device(op, name, tensor, other_name, other)


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same device as another argument."""
    if tensor.device != other.device:
        refuse(op, f"{name} on {other.device} like {other_name}", tensor.device)


def check_apart(op: str, name: str, written: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor that is written shares no element with another argument. Both consist of rows."""
    kinds = {type(written), type(other)} - {Tensor, torch.nn.Parameter}
    if torch.compiler.is_compiling() or kinds or "meta" in (written.device.type, other.device.type):
        return  # without memory, or it belongs to another
    begin, size, step, rows = _rows(written)
    other_begin, other_size, other_step, other_rows = _rows(other)
    if not rows or not other_rows or other_begin >= begin + (rows - 1) * step + size:
        return
    if begin >= other_begin + (other_rows - 1) * other_step + other_size:
        return
    # For each row of the other the first written row that ends behind its begin.
    for at in range(other_begin, other_begin + other_rows * other_step, other_step):
        row = max(0, (at - begin - size) // step + 1)
        if row < rows and begin + row * step < at + other_size:
            expected = f"{name} and {other_name} not to share memory"
            refuse(op, expected, "two that do", "copy one of them", RuntimeError)


def _rows(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address and size in bytes of a tensor's first row, bytes to the next row, number of rows."""
    width = tensor.element_size()
    if not tensor.numel() or is_unbroken(tensor):
        size = tensor.numel() * width
        return tensor.data_ptr(), size, size, min(size, 1)
    count, columns = tensor.shape
    if count > 1 and not tensor.stride(0):  # one row, repeated
        count = 1
    step = tensor.stride(0) if count > 1 else columns
    return tensor.data_ptr(), columns * width, step * width, count


def check_supported_device(op: str, tensor: Tensor) -> None:
    """CPU and CUDA run; meta tensors reach the fake kernels; nothing else is silently moved."""
    kind = tensor.device.type
    if kind == "cuda":
        problem = cuda_problem()
        if problem is not None:
            raise RuntimeError(f"gradsafe.{op}: got CUDA tensors, but {problem}")
    elif kind not in ("cpu", "meta"):
        refuse(op, "CPU or CUDA tensors", f"device {tensor.device}")


def written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that the backend wrote to these tensors; a compiled graph knows by schema."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])

"""Argument checks that the operators share. They run before anything reaches the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsafe._backend import cuda_problem

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor_list(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """A list (or tuple) that holds tensors only."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"gradsafe.{op}: expected {name} to be a list of tensors, got "
            f"{type(tensors).__name__}; put a single tensor into a list"
        )
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"gradsafe.{op}: expected {name}[{index}] to be a tensor, got "
                f"{type(tensor).__name__}"
            )


def check_matrix(op: str, name: str, tensor: Tensor, shape: str = "[O, I]") -> None:
    """A dense float matrix whose rows are unbroken in memory."""
    if tensor.dim() != 2:
        raise ValueError(
            f"gradsafe.{op}: expected {name} of shape {shape}, got {list(tensor.shape)}"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"gradsafe.{op}: expected {name} to be dense, got {tensor.layout}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"gradsafe.{op}: expected {name} of dtype float32, bfloat16 or float16, got "
            f"{tensor.dtype}"
        )
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"gradsafe.{op}: expected {name} with unit stride along its last dimension, got "
            f"strides {list(tensor.stride())}; call .contiguous() first"
        )


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device as another argument."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"gradsafe.{op}: expected {name} of dtype {other.dtype} like {other_name}, got "
            f"{tensor.dtype}"
        )
    check_device(op, name, tensor, other_name, other)


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same device as another argument."""
    if tensor.device != other.device:
        raise ValueError(
            f"gradsafe.{op}: expected {name} on {other.device} like {other_name}, got "
            f"{tensor.device}"
        )


def check_supported_device(op: str, tensor: Tensor) -> None:
    """CPU and CUDA run; meta tensors reach the fake kernels; nothing else is silently moved."""
    kind = tensor.device.type
    if kind == "cuda":
        problem = cuda_problem()
        if problem is not None:
            raise RuntimeError(f"gradsafe.{op}: got CUDA tensors, but {problem}")
    elif kind not in ("cpu", "meta"):
        raise ValueError(f"gradsafe.{op}: expected CPU or CUDA tensors, got device {tensor.device}")

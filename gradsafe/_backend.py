"""Loads the compiled module and says what it can do."""

from __future__ import annotations

import importlib
from typing import Any

import torch  # libtorch must be in the process before the module that links it

from gradsafe.device_code import driver_problem

try:
    _C: Any = importlib.import_module("gradsafe._C")
except ImportError as error:
    raise ImportError(
        "gradsafe: the compiled module gradsafe._C could not be loaded "
        f"({error}). Build it with `pip install --no-build-isolation .` in the environment that "
        "holds your PyTorch (2.10 or later), and import gradsafe from outside the source folder "
        "if it was not installed in editable mode."
    ) from error

# A wrong GRADSAFE_FORCE_ISA is reported here, at import, and not from inside the first operator.
_C.cpu_isa()


def cuda_problem() -> str | None:
    """Why CUDA tensors cannot be handled, or None if they can."""
    info = _C.build_info()
    if not info["cuda"]:
        return (
            f"gradsafe was built without CUDA kernels: {info['cuda_reason']}. Rebuild it with nvcc "
            "on PATH and GRADSAFE_CUDA=on"
        )
    if problem := driver_problem(*_C.cuda_versions()):
        return problem
    if torch.version.cuda is None:
        return (
            f"this PyTorch ({torch.__version__}) has no CUDA support; gradsafe's kernels are idle"
        )
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None


__all__ = ["_C", "cuda_problem"]

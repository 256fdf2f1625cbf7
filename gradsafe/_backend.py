"""Loads the compiled module and reports what it can do."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch  # libtorch must be in the process before the module that links it

from gradsafe.device_code import driver_problem

_BUILD = (
    "Build it with `pip install --no-build-isolation .` in the environment that holds your PyTorch "
    "(2.10 or later), and import gradsafe from outside the source folder if it was not installed "
    "in editable mode."
)

#: The compiled module; None where the plain PyTorch definitions replace it.
_C: Any = None
#: Why the plain definitions are in use; empty with the compiled module.
fallback_reason = ""

_chosen = os.environ.get("GRADSAFE_BACKEND", "native")
if _chosen not in ("native", "default"):
    raise ValueError(f'gradsafe: expected GRADSAFE_BACKEND="native" or "default", got {_chosen!r}')
if _chosen == "default":
    fallback_reason = "GRADSAFE_BACKEND=default is set"
else:
    try:
        _C = importlib.import_module("gradsafe._C")
    except ImportError as error:
        fallback_reason = f"the compiled module gradsafe._C could not be loaded ({error}). {_BUILD}"
    else:
        # A wrong GRADSAFE_FORCE_ISA is reported here, at import, not by the first operator.
        _C.cpu_isa()


def cuda_problem() -> str | None:
    """Why CUDA tensors cannot be handled, or None if they can."""
    if _C is not None:
        info = _C.build_info()
        if not info["cuda"]:
            return (
                f"gradsafe was built without CUDA kernels: {info['cuda_reason']}. Rebuild it with "
                "nvcc on PATH and GRADSAFE_CUDA=on"
            )
        if problem := driver_problem(*_C.cuda_versions()):
            return problem
    if torch.version.cuda is None:
        return (
            f"this PyTorch ({torch.__version__}) has no CUDA support; gradsafe's kernels are idle"
        )
    return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"

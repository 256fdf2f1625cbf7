"""Loads the model that a command names: the testbed, or a folder on this machine."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from gradsafe._backend import cuda_problem
from gradsafe._cli.options import TESTBED

OPTIONS = ("--model", "--device")


def load_model(
    name: str,
    dtype: str,
    device: str,
    progress: bool,
    number: int | None = None,
    options: tuple[str, str] = OPTIONS,
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer; nothing is downloaded or unpickled.

    Args:
        name: "testbed", or a folder in the Hugging Face layout with safetensors weights.
        dtype: Of the weights: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "auto": CUDA where it works, and a note on stderr where the
            machine has it but it does not.
        progress: Show a progress bar if the testbed must be trained.
        number: Which CUDA device, if not the current one.
        options: What name and device were given by, for errors.

    Returns:
        The model, in eval mode, and the tokenizer.

    Raises:
        ValueError: The folder holds no complete model, or CUDA was asked for and does not work.
    """
    place = choose_device(device, number, options[1])
    model: Any
    torch_dtype: torch.dtype = getattr(torch, dtype)
    transformers_logging.disable_progress_bar()  # ours says enough
    try:
        if name == TESTBED:
            from benchmarks import testbed

            model, tokenizer = testbed.load(progress=progress)
        else:
            model, tokenizer = _load_folder(name, torch_dtype, options[0])
    finally:
        transformers_logging.enable_progress_bar()
    return model.to(place, torch_dtype).eval(), tokenizer


def _load_folder(name: str, torch_dtype: torch.dtype, option: str) -> tuple[Any, Any]:
    if not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"{option} {name}: expected {TESTBED!r} or a model folder, but there is no "
            "config.json; download the model first"
        )
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=torch_dtype,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, report = loaded
    # transformers fills missing weights with random numbers and says so in a log line only.
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"{option} {name}: {len(missing)} weights are missing or of another shape than its "
            f"config.json says, for example {missing[0]}"
        )
    return model, tokenizer


def choose_device(device: str, number: int | None = None, option: str = OPTIONS[1]) -> torch.device:
    """Resolves "auto", and refuses "cuda" with the reason where it does not work."""
    problem = cuda_problem()
    if device == "cuda" and problem is not None:
        raise ValueError(f"{option} cuda: {problem}")
    if device == "auto" and problem is not None and torch.cuda.is_available():
        warnings.warn(f"using the CPU: {problem}", stacklevel=2)
    if problem is not None or device == "cpu":
        return torch.device("cpu")
    if number is None:
        return torch.device("cuda")
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"{option} {device}: process {number} of this machine has no GPU of its own: start at "
            f"most {torch.cuda.device_count()} (torchrun --nproc-per-node), or give {option} cpu"
        )
    place = torch.device("cuda", number)
    torch.cuda.set_device(place)  # kernels and NCCL take the current device
    return place

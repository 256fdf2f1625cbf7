"""Loads the model of a job: a folder or a Hub id, with an adapter, quantised, on any devices."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradsafe._backend import cuda_problem
from gradsafe._io.processes import Processes
from gradsafe._jobs.options import ModelOptions
from gradsafe._jobs.packaged import model_folder

if TYPE_CHECKING:
    from collections.abc import Iterator


def load_model(
    options: ModelOptions, processes: Processes | None = None, *, trainable: bool = False
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer; no weights are unpickled.

    Args:
        options: Which model, and how.
        processes: Each process of a machine takes a GPU of its own.
        trainable: The adapter is to be trained further.

    Returns:
        The model, in eval mode, and the tokenizer.

    Raises:
        ValueError: There is no such model, its weights are incomplete, or CUDA was asked for and
            does not work; the message says what to do.
        ImportError: A package for the options is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options.check()
    alone = processes is None or processes.count == 1
    place = choose_device(options.device, None if alone else processes.local_rank)  # type: ignore[union-attr]
    source = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    dtype = getattr(torch, options.dtype)
    name = model_folder(options.model)
    with _explained("--model", options.model):
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            device_map=options.device_map or (place if options.quantization else None),
            quantization_config=_quantization(options, dtype),
            **source,
        )
    model, report = loaded
    # transformers fills missing weights with random numbers, and only logs it.
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"--model {options.model}: {len(missing)} weights are missing or of another shape than "
            f"its config.json says, for example {missing[0]}"
        )
    if options.adapter:
        model = _with_adapter(model, options.adapter, trainable)
    if not (options.device_map or options.quantization):
        model = model.to(place)  # as transformers and PEFT: float32 rotary frequencies and adapters
    return model.eval(), tokenizer


def choose_device(device: str, number: int | None = None) -> torch.device:
    """Resolves "auto"; refuses "cuda" with the reason if it does not work.

    Args:
        device: "auto", "cpu" or "cuda".
        number: Which CUDA device; None for the current one.
    """
    problem = cuda_problem()
    if device == "cuda" and problem is not None:
        raise ValueError(f"--device cuda: {problem}")
    if device == "auto" and problem is not None and torch.cuda.is_available():
        warnings.warn(f"using the CPU: {problem}", stacklevel=2)
    if problem is not None or device == "cpu":
        return torch.device("cpu")
    if number is None:
        return torch.device("cuda")
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}: process {number} of this machine has no GPU of its own: start at "
            f"most {torch.cuda.device_count()} (torchrun --nproc-per-node), or give --device cpu"
        )
    place = torch.device("cuda", number)
    torch.cuda.set_device(place)  # kernels and NCCL use the current device
    return place


def _quantization(options: ModelOptions, dtype: torch.dtype) -> Any:
    if options.quantization is None:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--quantization needs bitsandbytes ({error}): pip install bitsandbytes"
        ) from error
    from transformers import BitsAndBytesConfig

    if options.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _with_adapter(model: Any, adapter: str, trainable: bool) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(
            f"--adapter needs peft ({error}): pip install 'gradsafe[peft]'"
        ) from error
    with _explained("--adapter", adapter):
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


@contextmanager
def _explained(option: str, name: str) -> Iterator[None]:
    """Says in one line why a model could not be loaded, and what to do."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise ValueError(f"{option} {name}: {_first_sentence(error)}") from error
        raise ValueError(
            f"{option} {name}: no such folder, and no such model in the local cache or on the "
            f"Hub ({_first_sentence(error)}); offline, download it before with `hf download "
            f"{name}`, or give a model folder"
        ) from error
    finally:
        logging.enable_progress_bar()


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0][:200]

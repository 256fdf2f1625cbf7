"""What a calibration belongs to: a threshold holds for these facts and for no others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn

from gradsafe._io.fingerprints import model_fingerprint, tokenizer_fingerprint
from gradsafe._version import __version__

# References were made with these: where one differs, a detector must be fitted anew.
FITTED = ("weights", "tokenizer", "dtype", "quantization")


def calibration_facts(
    model: nn.Module, tokenizer: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> dict[str, str] | None:
    """The facts of a detector and its surroundings, each as a short text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tensors: Those of `DetectorState.pack`.
        metadata: That of `DetectorState.pack`.

    Returns:
        By name: fingerprints of weights, tokenizer, template, references and options; data types
        and quantisation of the weights; versions of the libraries that scores depend on. None for
        a model with weights on the meta device, which have no fingerprint.
    """
    if any(weight.is_meta for weight in model.parameters()):
        return None
    config = dict(metadata["config"])
    template = config.pop("template") or getattr(tokenizer, "chat_template", None)
    weights = [p for p in model.parameters() if p.is_floating_point()]
    return {
        "weights": model_fingerprint(model)[:16],
        "tokenizer": tokenizer_fingerprint(tokenizer)[:16],
        "template": _digest(template),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in weights})),
        "quantization": _quantization(model),
        "references": _references(tensors, metadata),
        "options": _digest(config),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "gradsafe": __version__,
    }


def _quantization(model: nn.Module) -> str:
    chosen = getattr(getattr(model, "config", None), "quantization_config", None)
    if chosen is None:
        return "none"
    values = chosen if isinstance(chosen, dict) else chosen.to_dict()
    method = str(values.get("quant_method", "quantised")).rpartition(".")[2].lower()
    return f"{method} {_digest(values)}"


def _references(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Of the moments of every component and of what was learned, not of the large gradients.

    The folder's manifest holds a hash of those; other references have other moments.
    """
    small = {name: tensor for name, tensor in tensors.items() if "/weights/" not in name}
    digest = hashlib.sha256(json.dumps(metadata["scales"], sort_keys=True).encode())
    for name, tensor in sorted(small.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]

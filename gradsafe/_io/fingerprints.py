"""Fingerprints of models and tokenizers: what was computed with one is never mixed with another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gradsafe._io.artifacts import refuse_meta

# Entries of a config that do not change the forward pass.
_FREE = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript"),
    *("id2label", "label2id", "problem_type", "chunk_size_feed_forward", "quantization_config"),
    *("base_model_name_or_path", "inference_mode", "auto_mapping", "peft_version", "revision"),
    *("_attn_implementation", "attn_implementation", "_experts_implementation", "auto_map"),
    *("experts_implementation", "_attn_implementation_autoset", "pad_token_id"),
}
_CHUNK = 1 << 24  # bytes that are copied to the host at a time
_SAMPLES = 256  # values of a weight that are looked at again on every call
# Of every model: where its weights were, and the digest of each.
_known: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, str]]] = WeakKeyDictionary()


def model_fingerprint(model: nn.Module, without: Collection[int] = ()) -> str:
    """SHA-256 of a model: all its weights, and the config entries that change the forward pass.

    Weights are its parameters, and the buffers of its state dict, where quantised layers keep
    theirs. They are hashed as bytes, so the fingerprint is the same on every device. A weight is
    hashed once per process, and again if its memory, its version counter or one of 256 values has
    changed.

    Args:
        model: Any module; weights tied under several names count once.
        without: `id` of weights that are left out.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: A weight is on the meta device, so it has no values to read.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    weights = _weights(model)
    known = _known.setdefault(model, {})
    waiting = {}
    for name, weight in weights.items():
        refuse_meta(weight, f"weight {name!r}", "load the weights before fingerprinting")
        key = [(t.data_ptr(), t._version, t.shape, t.dtype, _sample(t)) for t in _plain(weight)]
        if known.get(name, (None,))[0] != key:
            waiting[name] = key
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib releases the interpreter's lock
        digests = pool.map(lambda name: _weight_digest(weights[name]), waiting)
        known |= {n: (waiting[n], digest) for n, digest in zip(waiting, digests, strict=True)}
    lines = [_config(model, adapters=not without)]
    for name, weight in weights.items():
        if id(weight) not in without:
            lines.append(f"{name} {tuple(weight.shape)} {weight.dtype} {known[name][1]}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def model_sample(model: nn.Module) -> str:
    """SHA-256 of the config and 256 values of each weight: cheap, and other after a training step.

    Weights on the meta device, which have no values, count by their shapes.
    """
    model = getattr(model, "_orig_mod", model)
    digest = hashlib.sha256(_config(model, adapters=True).encode())
    for name, weight in _weights(model).items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for tensor in _plain(weight):
            digest.update(b"" if tensor.is_meta else _sample(tensor))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how a tokenizer encodes a chat.

    These are the chat template, the special tokens, and the whole definition of a fast tokenizer:
    normalizer, pre-tokenizer, model, added tokens and post-processor; of a slow one its vocabulary.

    Returns:
        64 hexadecimal digits.
    """
    template, special = getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map
    if "pad_token" not in str(template):  # then no text has it
        special = {name: token for name, token in special.items() if name != "pad_token"}
    facts = {
        "chat_template": template,
        "special_tokens": special,
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
    }
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        definition = json.loads(backend.to_str())
        # Calls of the tokenizer change these two, and gradsafe sets both.
        facts["definition"] = definition | {"truncation": None, "padding": None}
    else:
        facts["vocabulary"] = sorted(tokenizer.get_vocab().items())
    text = json.dumps(facts, sort_keys=True, default=str)  # str: AddedToken objects
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the buffers of the state dict, by name."""
    # Not by state_dict(): that of quantised layers computes.
    passing = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in getattr(module, "_non_persistent_buffers_set", ())
    }
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name not in passing]
    return dict(sorted([*model.named_parameters(), *buffers], key=lambda item: item[0]))


def _config(model: nn.Module, *, adapters: bool) -> str:
    """The config of a model, and of its adapters, as far as they change the forward pass."""
    found: list[Any] = [getattr(model, "config", None)]
    facts: list[Any] = []
    known = getattr(model, "peft_config", None)
    if adapters and isinstance(known, dict) and known:
        active = _active_adapters(model)
        found += [known[name] for name in active if name in known]
        off = any(getattr(module, "disable_adapters", None) is True for module in model.modules())
        facts = [active] * (len(known) > 1) + ["adapters off"] * off
    parts = [config.to_dict() for config in found if hasattr(config, "to_dict")]
    return json.dumps([*map(_reduced, parts), *facts], sort_keys=True, default=str)


def _active_adapters(model: nn.Module) -> list[str]:
    # That of transformers' models is a method. It raises where PEFT wrapped the model, and for a
    # version of PEFT that transformers does not support; the adapted layers know the names as well.
    for module in model.modules():
        names: Any = getattr(module, "active_adapters", None)
        if names is not None and not callable(names):
            return [names] if isinstance(names, str) else list(names)
    return []


def _reduced(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _reduced(v) for k, v in value.items() if k not in _FREE}
    if isinstance(value, set):
        return sorted(map(str, value))
    return [_reduced(item) for item in value] if isinstance(value, (list, tuple)) else value


def _weight_digest(weight: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in _plain(weight):
        flat = tensor.contiguous().reshape(-1)
        for part in flat.split(max(1, _CHUNK // flat.element_size())):
            digest.update(part.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    """Evenly spaced values: `.data` changes a weight without a new version."""
    count = tensor.numel()
    picks = torch.arange(min(count, _SAMPLES)) * count // max(1, min(count, _SAMPLES))
    if tensor.element_size() == 1:  # fp8 has no indexing kernel everywhere
        tensor = tensor.view(torch.uint8)
    if tensor.ndim:
        tensor = tensor[torch.unravel_index(picks.to(tensor.device), tuple(tensor.shape))]
    return bytes(tensor.reshape(-1).contiguous().cpu().view(torch.uint8).numpy())


def _plain(weight: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the values of a weight."""
    weight = weight.detach()
    if is_traceable_wrapper_subclass(weight) and not hasattr(weight, "full_tensor"):
        # Quantised weights (torchao) hold codes and scales.
        names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
        for name in names:
            yield from _plain(getattr(weight, name))
    elif hasattr(weight, "to_local"):  # a shard of DTensor
        yield weight.to_local()
    else:
        yield weight

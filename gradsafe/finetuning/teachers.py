"""Where the reference distribution comes from: adapters off, a cache, a second model, or labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradsafe._io.artifacts import StorageError, load_folder, save_folder
from gradsafe._io.fingerprints import model_fingerprint
from gradsafe.finetuning.chunked_kl import Teacher
from gradsafe.finetuning.output_head import OutputHead, eval_mode, unwrapped

KIND = "alignment_reference"
Batch = Mapping[str, Any]


class Reference(Protocol):
    """Gives the reference's logits at the counted positions of a batch."""

    def teacher(self, inputs: dict[str, Tensor], counted: Tensor) -> Teacher:
        """`inputs`: of the student's forward; `counted`: `[B, T]` bool."""
        ...


class ModelReference:
    """A second, frozen model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.head = OutputHead.of(model)

    def teacher(self, inputs: dict[str, Tensor], counted: Tensor) -> Teacher:  # noqa: D102
        if self.head.sharded:
            raise ValueError(
                "gradsafe.KLAlignment: the reference model is sharded, but its output head is read "
                'outside of its forward; keep it whole, or use reference="adapter_off" or "cached"'
            )
        with eval_mode(self.model):
            hidden = self.head.run(self.model, inputs)
        hidden = hidden[counted.to(hidden.device)]
        return lambda begin, end: self._logits(hidden[begin:end])

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head.logits(hidden)


def refuse_shared(reference: nn.Module, model: nn.Module) -> None:
    """Raises ValueError if what is trained in `model` is a part of the reference, too."""
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    shared = [trained[id(p)] for p in reference.parameters() if id(p) in trained]
    if shared:
        raise ValueError(
            f"gradsafe.KLAlignment: the reference shares trained parameters with the model "
            f"({shared[0]}), so it would drift with it; use "
            'reference="adapter_off", "cached", or a copy loaded anew'
        )


class AdapterOffReference:
    """The model itself with its PEFT adapters switched off."""

    def __init__(self, model: nn.Module, head: OutputHead) -> None:
        self.peft: Any = _peft_model(model)
        stray = _trained_outside_adapters(self.peft)
        if stray:
            raise ValueError(
                f'gradsafe.KLAlignment: reference="adapter_off" needs all trainable parameters '
                f"inside adapters, but {stray[0]} is not, so the reference would drift; freeze it "
                f"or pass a frozen second model"
            )
        self.head = head

    def teacher(self, inputs: dict[str, Tensor], counted: Tensor) -> Teacher:  # noqa: D102
        with eval_mode(self.peft), _adapters_off(self.peft):
            hidden = self.head.run(self.peft, inputs)
        hidden = hidden[counted.to(hidden.device)]
        return lambda begin, end: self._logits(hidden[begin:end])

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.head.linear:  # no adapter on it
            with torch.no_grad():
                return self.head.logits(hidden)
        with eval_mode(self.head.module), _adapters_off(self.peft):
            return self.head.logits(hidden)


def without_adapters(model: nn.Module) -> str:
    """The fingerprint of the model with its adapters off."""
    return model_fingerprint(model, _in_adapters(model))


class CachedReference:
    """Final hidden states of the model as it was, computed once for all alignment samples.

    Rows are found by their token ids, whatever the padding. The output head must stay frozen.
    """

    def __init__(
        self, model: nn.Module, head: OutputHead, path: str | os.PathLike[str] | None = None
    ) -> None:
        self.model = model
        self.head = head
        if self.head.trainable:
            raise ValueError(
                'gradsafe.KLAlignment: reference="cached" needs a frozen output head (weights '
                "tied to trained embeddings count as trained); freeze it or pass a frozen second "
                "model"
            )
        self.states: dict[str, Tensor] = {}
        if path is not None:
            self._load(path)

    def add(self, inputs: dict[str, Tensor]) -> None:
        """Computes and keeps the states of a batch's rows, on the CPU."""
        with eval_mode(self.model):
            hidden = self.head.run(self.model, inputs)
        for key, real, states in zip(*_rows(inputs), hidden, strict=True):
            self.states[key] = states[real.to(states.device)].cpu()

    def teacher(self, inputs: dict[str, Tensor], counted: Tensor) -> Teacher:  # noqa: D102
        parts = []
        for row, (key, real, wanted) in enumerate(zip(*_rows(inputs), counted, strict=True)):
            if key not in self.states:
                raise ValueError(
                    f"gradsafe.KLAlignment: row {row} of the batch is not among the "
                    f"{len(self.states)} cached samples; call cache() with every alignment sample, "
                    f"tokenised as in training, before training starts"
                )
            if bool((wanted & ~real).any()):
                raise ValueError(
                    'gradsafe.KLAlignment: expected kl_tokens "response" or "non_pad" with '
                    'reference="cached", got "all": padding has no cached states'
                )
            parts.append(self.states[key][wanted[real].cpu()])
        hidden = torch.cat(parts).to(inputs["input_ids"].device)
        return lambda begin, end: self._logits(hidden[begin:end])

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head.logits(hidden)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder of safetensors with the fingerprints of the model and its head."""
        save_folder(path, KIND, self.states, self._fingerprints())

    def _load(self, path: str | os.PathLike[str]) -> None:
        states, metadata = load_folder(path, KIND)
        for what, own in self._fingerprints().items():
            if metadata.get(what) != own:
                raise StorageError(
                    f"{path} was computed with another {what}: {metadata.get(what)}, this model "
                    f"has {own}; load the cache before training or a checkpoint changes the model"
                )
        self.states = states

    def _fingerprints(self) -> dict[str, str]:
        return {
            "output head": model_fingerprint(self.head.module),
            "model": model_fingerprint(unwrapped(self.model)),
        }


def _rows(inputs: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """Per row the key of its real tokens, and where they are, `[B, T]` bool."""
    real = inputs["attention_mask"].bool()
    ids = inputs["input_ids"].cpu().to(torch.int64)
    keys = [
        hashlib.sha256(row[mask].numpy().tobytes()).hexdigest()
        for row, mask in zip(ids, real.cpu(), strict=True)
    ]
    return keys, real


def _peft_model(model: nn.Module) -> nn.Module:
    """The PEFT wrapper inside DDP and `torch.compile`."""
    inner: Any = model
    while not callable(getattr(inner, "disable_adapter", None)):
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(wrapped, nn.Module):
            raise ValueError(
                f'gradsafe.KLAlignment: reference="adapter_off" needs a model with PEFT adapters, '
                f'got {type(inner).__name__}; use reference="cached" or pass a frozen second model'
            )
        inner = wrapped
    return inner


@contextmanager
def _adapters_off(peft: Any) -> Iterator[None]:
    """Switches the adapters off, and leaves alone what is trained.

    PEFT would freeze the adapters meanwhile, and FSDP2 keeps such flags for the gathered copies
    that it makes in the first forward pass. Afterwards PEFT would train all of them, those that
    were frozen, too.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]

    def restore() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    try:
        with peft.disable_adapter():
            restore()
            yield
    finally:
        restore()


def _in_adapters(model: nn.Module) -> set[int]:
    """`id` of the weights that are out of use when the adapters are switched off."""
    inside: set[int] = set()
    base: set[int] = set()
    for module in model.modules():
        original = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if isinstance(original, nn.Module):
            inside |= {id(weight) for weight in (*module.parameters(), *module.buffers())}
            base |= {id(weight) for weight in (*original.parameters(), *original.buffers())}
    return inside - base


def _trained_outside_adapters(model: nn.Module) -> list[str]:
    """Names of trained parameters that stay in place when the adapters are switched off."""
    switched_off = _in_adapters(model)
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and id(p) not in switched_off]

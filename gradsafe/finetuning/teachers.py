"""Sources of the reference distribution: adapters off, a second model, or cached states."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe._io.artifacts import StorageError, load_folder, save_folder
from gradsafe._io.fingerprints import model_fingerprint
from gradsafe.finetuning.chunked_kl import Teacher
from gradsafe.finetuning.output_head import OutputHead, inference, is_sharded
from gradsafe.models.inspection import unwrapped

KIND = "alignment_reference"
Batch = Mapping[str, Any]


@dataclass
class ModelReference:
    """A reference that runs on every batch: a second model, or the student without adapters."""

    model: nn.Module
    head: OutputHead
    adapters_off: Callable[[], AbstractContextManager[None]] = nullcontext  # of the student

    def teacher(self, inputs: dict[str, Tensor], counted: Tensor) -> Teacher:
        """Return the teacher of a batch: `inputs` of the forward, positions `counted` `[B, T]`."""
        if self.adapters_off is nullcontext and is_sharded(self.head.module):
            raise ValueError(
                "gradsafe.KLAlignment: the reference model is sharded, but its output head is read "
                'outside its forward; do not shard it, or use reference="adapter_off" or "cached"'
            )
        with inference(self.model), self.adapters_off():
            hidden = self.head.run(self.model, inputs)
        chosen = hidden[counted.to(hidden.device)]
        return _teacher(self.model, self.head, chosen, self.adapters_off)


class CachedReference:
    """Final hidden states of the model, computed once for all alignment samples.

    Rows are found by their token ids, whatever the padding. The output head must be frozen.
    """

    def __init__(
        self, model: nn.Module, head: OutputHead, path: str | os.PathLike[str] | None = None
    ) -> None:
        self.model, self.head = model, head
        if head.trainable:
            raise ValueError(
                'gradsafe.KLAlignment: reference="cached" needs a frozen output head (weights tied '
                "to trained embeddings are trained); freeze it or pass a frozen second model"
            )
        self.states: dict[str, Tensor] = {}
        if path is None:
            return
        self.states, metadata = load_folder(path, KIND)
        for what, own in self._fingerprints().items():
            if metadata.get(what) != own:
                raise StorageError(
                    f"{path} was computed with another {what}: {metadata.get(what)}, this model "
                    f"has {own}; load the cache before training or a checkpoint changes the model"
                )

    def add(self, inputs: dict[str, Tensor]) -> None:
        """Computes the states of a batch's rows and keeps them on the CPU."""
        with inference(self.model):
            hidden = self.head.run(self.model, inputs)
        for key, real, states in zip(*_rows(inputs), hidden, strict=True):
            self.states[key] = states[real.to(states.device)].cpu()

    def teacher(self, inputs: dict[str, Tensor], counted: Tensor) -> Teacher:
        """As in `ModelReference`."""
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
        return _teacher(self.model, self.head, hidden)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder of safetensors with the fingerprints of the model and its head."""
        save_folder(path, KIND, self.states, self._fingerprints())

    def _fingerprints(self) -> dict[str, str]:
        return {
            "output head": model_fingerprint(self.head.module),
            "model": model_fingerprint(unwrapped(self.model)),
        }


def refuse_shared(reference: nn.Module, model: nn.Module) -> None:
    """Raises ValueError if the reference contains parameters that are trained in `model`."""
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    shared = [trained[id(p)] for p in reference.parameters() if id(p) in trained]
    if shared:
        raise ValueError(
            f"gradsafe.KLAlignment: the reference shares trained parameters with the model "
            f'({shared[0]}), so training would change it; use reference="adapter_off", "cached", '
            "or a copy loaded separately"
        )


def adapter_off(model: nn.Module, head: OutputHead) -> ModelReference:
    """Return a reference that is the model itself with its PEFT adapters switched off."""
    peft = next((m for m in model.modules() if callable(getattr(m, "disable_adapter", None))), None)
    if peft is None or unwrapped(peft) is not unwrapped(model):
        raise ValueError(
            'gradsafe.KLAlignment: reference="adapter_off" needs a model with PEFT adapters, '
            f"got {type(unwrapped(model)).__name__}; use "
            'reference="cached" or pass a frozen second model'
        )
    switched_off = in_adapters(peft)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad and id(parameter) not in switched_off:
            raise ValueError(
                f'gradsafe.KLAlignment: reference="adapter_off" needs all trainable parameters '
                f"inside adapters, but {name} is not, so training would change the reference; "
                f"freeze it or pass a frozen second model"
            )
    return ModelReference(peft, head, lambda: _adapters_off(peft))


def _teacher(
    model: nn.Module,
    head: OutputHead,
    hidden: Tensor,
    adapters_off: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Teacher:
    """Return the logits of states `[N, d]` on request."""
    off = nullcontext if head.linear else adapters_off  # a linear head has no adapter

    def logits(begin: int, end: int) -> Tensor:
        with inference(model, head.module), off():
            return head.logits(hidden[begin:end])

    return logits


def _rows(inputs: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """Return a key of each row's real tokens, and their positions, `[B, T]` bool."""
    real = inputs["attention_mask"].bool()
    ids = inputs["input_ids"].cpu().to(torch.int64)
    keys = [
        hashlib.sha256(row[mask].numpy().tobytes()).hexdigest()
        for row, mask in zip(ids, real.cpu(), strict=True)
    ]
    return keys, real


@contextmanager
def _adapters_off(peft: Any) -> Iterator[None]:
    """Switches the adapters off without changing any `requires_grad`.

    Inside, PEFT would freeze the adapters, and FSDP2 copies such flags to the weights that it
    gathers in the first forward pass. Afterwards, PEFT would unfreeze all adapters.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
    try:
        with peft.disable_adapter():
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def in_adapters(model: nn.Module) -> set[int]:
    """Return the `id` of the weights that are not used when the adapters are switched off."""
    inside: set[int] = set()
    base: set[int] = set()
    for module in model.modules():
        original = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if isinstance(original, nn.Module):
            inside |= {id(weight) for weight in (*module.parameters(), *module.buffers())}
            base |= {id(weight) for weight in (*original.parameters(), *original.buffers())}
    return inside - base

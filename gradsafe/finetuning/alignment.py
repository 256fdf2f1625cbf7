"""The alignment losses of SafeGrad: KL to a reference, and cross-entropy as the ablation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsafe._checks import check_value, refuse
from gradsafe.finetuning.chunked_kl import CHUNK_TOKENS, Teacher, chunked_kl
from gradsafe.finetuning.config import KLTokens
from gradsafe.finetuning.output_head import OutputHead
from gradsafe.finetuning.rows import IGNORED
from gradsafe.finetuning.teachers import (
    Batch,
    CachedReference,
    ModelReference,
    adapter_off,
    refuse_shared,
)
from gradsafe.models.inspection import forward_parameters, input_device, unwrapped


class KLAlignment:
    """KL(reference || model) on alignment samples, in chunks of tokens: `[T, V]` never exists.

    `loss = alignment(batch)` is a scalar to call `backward()` on. The forward pass calls the given
    model (also wrapped in DDP, FSDP2, `torch.compile` or PEFT, so that their hooks run), but takes
    the final hidden states at the input of the output head and computes the loss from them. The
    reference runs in eval mode, without gradients and outside DDP; a second model must not be
    sharded.

    Direction as in arXiv 2508.07172, equation 6. The loss is the sum over the positions selected by
    `kl_tokens`, always divided by the number of response tokens of the batch.

    Args:
        model: A causal language model of transformers, wrapped or not.
        reference: "adapter_off" (the model with its PEFT adapters off), "cached" (its final hidden
            states before training, see `cache`; the output head must be frozen), or a second model,
            which must not share trained parameters with the first.
        kl_tokens: Positions included in the loss: "response" (those that predict a label other than
            -100), "non_pad" (prompt and response) or "all" (padding too, as in the reference code;
            the value then depends on the padding).
        cache: Folder written by `cache(..., path=)`, for reference "cached".
        chunk_tokens: Number of tokens whose logits exist at a time.

    Raises:
        ValueError: "adapter_off" without adapters or with other trainable parameters, "cached" with
            a trainable head, a second model that shares trained parameters, or an unknown option.
        StorageError: The cache belongs to another model or head, or is damaged.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Literal["adapter_off", "cached"] | nn.Module = "adapter_off",
        kl_tokens: KLTokens = "response",
        *,
        cache: str | os.PathLike[str] | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        check_value("KLAlignment", "kl_tokens", kl_tokens, KLTokens)
        if chunk_tokens < 1:
            refuse("KLAlignment", "chunk_tokens >= 1", chunk_tokens)
        if cache is not None and reference != "cached":
            raise ValueError('gradsafe.KLAlignment: cache= is for reference="cached" only')
        self.model = model
        self.kl_tokens: KLTokens = kl_tokens
        self.chunk_tokens = chunk_tokens
        self.head = OutputHead.of(model)
        self.reference: Any = self._reference(reference, cache)

    def _reference(
        self, reference: str | nn.Module, cache: str | os.PathLike[str] | None
    ) -> ModelReference | CachedReference | None:
        if reference == "adapter_off":
            return adapter_off(self.model, self.head)
        if reference == "cached":
            return CachedReference(self.model, self.head, cache)
        if not isinstance(reference, nn.Module):
            expected = 'reference to be "adapter_off", "cached" or a model (load it first)'
            refuse("KLAlignment", expected, repr(reference))
        refuse_shared(reference, self.model)
        return ModelReference(reference, OutputHead.of(reference))

    def cache(self, batches: Iterable[Batch], path: str | os.PathLike[str] | None = None) -> int:
        """Computes the reference's final hidden states; call it before training.

        Args:
            batches: Batches as for the call; labels are not needed.
            path: Folder to save the states to, for a later `KLAlignment(..., cache=path)`.

        Returns:
            Number of cached samples.

        Raises:
            ValueError: `reference` is not "cached".
        """
        if not isinstance(self.reference, CachedReference):
            raise ValueError('gradsafe.KLAlignment: cache() is for reference="cached" only')
        for batch in batches:
            self.reference.add(self._inputs(batch))
        if path is not None:
            self.reference.save(path)
        return len(self.reference.states)

    def __call__(
        self, batch: Batch, model: nn.Module | None = None, normalizer: float | None = None
    ) -> Tensor:
        """Computes the loss of one batch.

        Args:
            batch: `input_ids`, `attention_mask` and `labels` (-100 outside the response), each
                `[B, T]`, and optionally `position_ids` (default: counted from the mask).
            model: Wrapper to run instead of the model given at construction, for example the DDP
                module created later.
            normalizer: Divisor in place of the batch's number of response tokens: 1 for the sum, or
                the total over accumulated batches.

        Returns:
            Scalar, float32 (float64 for a float64 model).

        Raises:
            ValueError: A tensor of the batch is missing or has another shape, there is no response
                token, or a sample is not cached.
            RuntimeError: The model's forward is not supported, or its head is not a plain linear
                layer and GRADSAFE_STRICT=1 forbids the slower path.
        """
        runs = self.model if model is None else model
        if unwrapped(runs) is not unwrapped(self.model):
            raise ValueError(
                "gradsafe.KLAlignment: expected model to wrap the model given at construction"
            )
        inputs = self._inputs(batch)
        mask = inputs["attention_mask"].bool()
        labels = _matrix(batch, "labels", mask.shape).to(mask.device)
        # The positions whose logits predict a label: the labels, shifted by one.
        response = torch.zeros_like(mask)
        response[:, :-1] = labels[:, 1:] != IGNORED
        tokens = int(response.sum())
        if tokens == 0:
            raise ValueError(
                'gradsafe.KLAlignment: no response token in the batch: every batch["labels"] after '
                "the first position is -100"
            )
        choices = {"response": response, "non_pad": mask, "all": torch.ones_like(mask)}
        counted = choices[self.kl_tokens]
        teacher = self._teacher(inputs, counted, labels)

        def divergence(hidden: Tensor) -> Tensor:
            states = hidden[counted.to(hidden.device)]
            return chunked_kl(states, self.head, teacher, self.chunk_tokens)

        total = self.head.run(runs, inputs, divergence)
        return total / (tokens if normalizer is None else normalizer)

    def _teacher(self, inputs: dict[str, Tensor], counted: Tensor, labels: Tensor) -> Teacher:
        return self.reference.teacher(inputs, counted)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Inputs of the forward; positions are counted from the mask, so padding has no effect."""
        ids = _matrix(batch, "input_ids")
        mask = _matrix(batch, "attention_mask", ids.shape)
        inner = unwrapped(self.model)
        device = input_device(inner) or ids.device
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if "position_ids" in forward_parameters(inner):
            positions = batch.get("position_ids")
            if positions is None:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = positions.to(device)
        return {**inputs, "use_cache": False}


class SFTAlignment(KLAlignment):
    """Cross-entropy on the alignment responses: the paper's ablation SafeGrad (SFT).

    Same interface and code path as `KLAlignment`: the reference distribution of a position has all
    its mass on the label, so the divergence equals the cross-entropy.
    """

    def __init__(self, model: nn.Module, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        super().__init__(model, chunk_tokens=chunk_tokens)

    def _reference(self, reference: object, cache: object) -> None:
        return None

    def _teacher(self, inputs: dict[str, Tensor], counted: Tensor, labels: Tensor) -> Teacher:
        targets = labels.roll(-1, 1)[counted]
        weight: Any = getattr(self.head.module, "weight", None)
        vocabulary = int(getattr(self.head.module, "out_features", 0) or weight.shape[0])
        dtype = torch.float32 if weight.dtype != torch.float64 else torch.float64

        def one_hot(begin: int, end: int) -> Tensor:
            shape = (end - begin, vocabulary)
            logits = torch.full(shape, -math.inf, dtype=dtype, device=targets.device)
            return logits.scatter_(1, targets[begin:end, None], 0.0)

        return one_hot


def _matrix(batch: Batch, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return a tensor of the batch, after a check of its shape."""
    value = batch.get(name)
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape != (shape or value.shape):
        wanted = "[B, T]" if shape is None else list(shape)
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        refuse("KLAlignment", f'batch["{name}"] of shape {wanted}', got)
    return value

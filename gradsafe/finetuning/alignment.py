"""The alignment losses of SafeGrad: KL to a reference, and cross-entropy as the ablation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsafe.finetuning.chunked_kl import CHUNK_TOKENS, Teacher, chunked_kl
from gradsafe.finetuning.output_head import OutputHead, unwrapped
from gradsafe.finetuning.teachers import (
    AdapterOffReference,
    Batch,
    CachedReference,
    ModelReference,
    Reference,
    refuse_shared,
)
from gradsafe.models.inspection import forward_parameters, input_device

KLTokens = Literal["response", "non_pad", "all"]
KL_TOKENS: tuple[KLTokens, ...] = ("response", "non_pad", "all")
IGNORED = -100


class KLAlignment:
    """KL(reference || model) on alignment samples, in chunks of tokens: `[T, V]` is never held.

    `loss = alignment(batch)` is a scalar to call `backward()` on. The forward pass goes through the
    model that is passed (DDP, FSDP2, `torch.compile` and PEFT wrappers included, so their hooks
    fire); hidden states are taken, and the loss is computed, at the input of its output head, which
    itself sees no position. The reference runs in eval mode, without gradients and outside of DDP;
    a second model must not be sharded.

    The direction is the one of arXiv 2508.07172, equation 6. The loss is the sum over the counted
    positions divided by the number of response tokens of the batch, whatever `kl_tokens` is.

    Args:
        model: a causal language model of transformers, wrapped or not.
        reference: "adapter_off" (the model with its PEFT adapters off), "cached" (its final hidden
            states before training, see `cache`; the output head must be frozen), or a second
            model, which is used as it is and must not share what is trained.
        kl_tokens: positions that count: "response" (those that predict a label other than -100),
            "non_pad" (all real tokens) or "all" (padding too, as the reference code does; the
            value then depends on the padding).
        cache: folder written by `cache(..., path=)`, for reference "cached".
        chunk_tokens: tokens whose logits exist at a time.

    Raises:
        ValueError: "adapter_off" without adapters or with other trainable parameters, "cached"
            with a trainable head, a second model that shares trained parameters, or an unknown
            option.
        StorageError: the cache belongs to another model or head, or is damaged.
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
        if kl_tokens not in KL_TOKENS:
            raise ValueError(
                f"gradsafe.KLAlignment: expected kl_tokens in {list(KL_TOKENS)}, got {kl_tokens!r}"
            )
        if chunk_tokens < 1:
            raise ValueError(
                f"gradsafe.KLAlignment: expected chunk_tokens >= 1, got {chunk_tokens}"
            )
        if cache is not None and reference != "cached":
            raise ValueError('gradsafe.KLAlignment: cache= is for reference="cached" only')
        self.model = model
        self.kl_tokens: KLTokens = kl_tokens
        self.chunk_tokens = chunk_tokens
        self.head = OutputHead.of(model)
        self.reference = self._reference(reference, cache)

    def _reference(
        self, reference: str | nn.Module, cache: str | os.PathLike[str] | None
    ) -> Reference:
        if isinstance(reference, nn.Module):
            refuse_shared(reference, self.model)
            return ModelReference(reference)
        if reference == "adapter_off":
            return AdapterOffReference(self.model, self.head)
        if reference == "cached":
            return CachedReference(self.model, self.head, cache)
        raise ValueError(
            f'gradsafe.KLAlignment: expected reference to be "adapter_off", "cached" or a model, '
            f"got {reference!r}"
        )

    def cache(self, batches: Iterable[Batch], path: str | os.PathLike[str] | None = None) -> int:
        """Computes the reference's final hidden states; call it before training.

        Args:
            batches: batches as for the call; labels are not needed.
            path: folder to save them to, for a later `KLAlignment(..., cache=path)`.

        Returns:
            Number of samples held.

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
        """The loss of one batch.

        Args:
            batch: `input_ids`, `attention_mask`, `labels` `[B, T]` (labels -100 outside of the
                response), and `position_ids` if you want others than counted from the mask.
            model: wrapper to run in place of the model given at construction, for example the one
                that DDP made of it later.
            normalizer: divide by this instead of the batch's number of response tokens: 1 for the
                sum, or the total over accumulated batches.

        Returns:
            Scalar, float32 (float64 for a float64 model).

        Raises:
            ValueError: a part of the batch is missing or of another shape, no response token, or a
                sample that is not cached.
            RuntimeError: the model's forward does not fit (see `OutputHead.run`), or the slower
                path of a head that is no plain linear layer under GRADSAFE_STRICT=1.
        """
        runs = self.model if model is None else model
        if unwrapped(runs) is not unwrapped(self.model):
            raise ValueError(
                "gradsafe.KLAlignment: expected model to wrap the model given at construction"
            )
        labels = batch.get("labels")
        inputs = self._inputs(batch)
        mask = inputs["attention_mask"].bool()
        if not isinstance(labels, Tensor) or labels.shape != mask.shape:
            got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f'gradsafe.KLAlignment: expected batch["labels"] of shape {list(mask.shape)}, '
                f"got {got}"
            )
        response = _predicting(labels.to(mask.device))
        tokens = int(response.sum())
        if tokens == 0:
            raise ValueError(
                'gradsafe.KLAlignment: no response token in the batch: every batch["labels"] after '
                "the first position is -100"
            )
        counted = self._counted(response, mask)
        teacher = self._teacher(inputs, counted, labels.to(mask.device))

        def divergence(hidden: Tensor) -> Tensor:
            counted_states = hidden[counted.to(hidden.device)]
            return chunked_kl(counted_states, self.head, teacher, self.chunk_tokens)

        total = self.head.run(runs, inputs, divergence)
        return total / (tokens if normalizer is None else normalizer)

    def _teacher(self, inputs: dict[str, Tensor], counted: Tensor, labels: Tensor) -> Teacher:
        return self.reference.teacher(inputs, counted)

    def _counted(self, response: Tensor, mask: Tensor) -> Tensor:
        if self.kl_tokens == "response":
            return response
        return mask if self.kl_tokens == "non_pad" else torch.ones_like(mask)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the forward gets; positions count real tokens, so that padding changes nothing."""
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        for name, value in (("input_ids", ids), ("attention_mask", mask)):
            if not isinstance(value, Tensor) or value.dim() != 2:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"gradsafe.KLAlignment: expected batch[{name!r}] of shape [B, T], got {got}"
                )
        assert isinstance(ids, Tensor)
        assert isinstance(mask, Tensor)
        inner = unwrapped(self.model)
        device = input_device(inner) or ids.device
        inputs: dict[str, Any] = {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "use_cache": False,
        }
        accepted = forward_parameters(inner)
        if "position_ids" in accepted:
            positions = batch.get("position_ids")
            if positions is None:
                positions = (inputs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = positions.to(device)
        return inputs


class SFTAlignment(KLAlignment):
    """Cross-entropy on the alignment responses: the paper's ablation SafeGrad (SFT).

    The same interface and path as `KLAlignment`: a label is a reference distribution with all its
    mass on one token, and the divergence from it is the cross-entropy.

    Args:
        model: as in `KLAlignment`.
        chunk_tokens: as in `KLAlignment`.
    """

    def __init__(self, model: nn.Module, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        super().__init__(model, model, chunk_tokens=chunk_tokens)

    def _reference(
        self, reference: str | nn.Module, cache: str | os.PathLike[str] | None
    ) -> Reference:
        return ModelReference(self.model)  # never run: the labels are the reference

    def _teacher(self, inputs: dict[str, Tensor], counted: Tensor, labels: Tensor) -> Teacher:
        targets = labels.roll(-1, 1)[counted]
        weight: Any = getattr(self.head.module, "weight", None)
        vocabulary = int(getattr(self.head.module, "out_features", 0) or weight.shape[0])

        def one_hot(begin: int, end: int) -> Tensor:
            dtype = torch.float32 if weight.dtype != torch.float64 else torch.float64
            logits = torch.full(
                (end - begin, vocabulary), -math.inf, dtype=dtype, device=targets.device
            )
            return logits.scatter_(1, targets[begin:end, None], 0.0)

        return one_hot


def _predicting(labels: Tensor) -> Tensor:
    """Positions whose logits predict a label: the mask of the labels, shifted by one."""
    response = torch.zeros_like(labels, dtype=torch.bool)
    response[:, :-1] = labels[:, 1:] != IGNORED
    return response

"""Output head and KL divergence in one step, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradsafe._fallback import announce_fallback
from gradsafe.finetuning.output_head import OutputHead
from gradsafe.ops import _default, kl_divergence_

CHUNK_TOKENS = 256
# Logits of the reference for the tokens [begin, end).
Teacher = Callable[[int, int], Tensor]


def chunked_kl(
    hidden: Tensor, head: OutputHead, teacher: Teacher, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum over tokens of KL(teacher || student) of final hidden states `[N, d]`, a scalar.

    The gradients are computed in the forward pass, while the logits of a chunk exist, and scaled by
    the incoming gradient in the backward pass. At most two buffers of `chunk_tokens * V` logits
    exist at a time (three if the head is not a plain linear layer).
    """
    if not head.plain:
        announce_fallback(
            f"gradsafe.KLAlignment: the output head of {head.name} is not a plain linear layer "
            f"(adapter, quantisation, soft-capping or scaling); its gradient comes from autograd, "
            f"chunk by chunk"
        )
    return _ChunkedKL.apply(head.ready(hidden), head, teacher, chunk_tokens, *head.trainable)


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: OutputHead, teacher: Teacher, chunk: int, *trained: Tensor
    ) -> Tensor:
        ctx.wants_hidden = ctx.needs_input_grad[0]
        # Gradients of the head are summed over chunks in float32 at least.
        gradients = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for p in (trained if any(ctx.needs_input_grad[4:]) else ())
        ]
        hidden_gradient = torch.empty_like(hidden) if ctx.wants_hidden else None
        step = _linear_step if head.plain else _autograd_step
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for begin in range(0, len(hidden), chunk):
            end = min(begin + chunk, len(hidden))
            into = None if hidden_gradient is None else hidden_gradient[begin:end]
            target = teacher(begin, end).to(hidden.device)
            total += step(head, hidden[begin:end], target, into, gradients).sum(dtype=torch.float64)
        ctx.trained = [(p.dtype, p.device) for p in trained]
        ctx.save_for_backward(*([hidden_gradient] if ctx.wants_hidden else []), *gradients)
        return total if hidden.dtype == torch.float64 else total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        hidden = saved.pop(0) * scale if ctx.wants_hidden else None
        parameters: list[Tensor | None] = [None] * len(ctx.trained)
        for index, gradient in enumerate(saved):
            dtype, device = ctx.trained[index]
            parameters[index] = (gradient * scale.to(device)).to(dtype)
        return hidden, None, None, None, *parameters


def _linear_step(
    head: OutputHead, hidden: Tensor, teacher: Tensor, into: Tensor | None, gradients: list[Tensor]
) -> Tensor:
    """One chunk of a plain linear head: adds to `gradients`, fills `into`, returns values `[n]`."""
    weight: Any = head.module.weight
    logits = head.project(hidden)
    values = _kl_in_place(logits, teacher)
    # From here on `logits` holds the gradient with respect to the logits.
    if into is not None:
        if into.dtype == logits.dtype == weight.dtype:
            torch.mm(logits, weight, out=into)
        else:  # under autocast
            into.copy_(logits @ weight.to(logits.dtype))
    for parameter, gradient in zip(head.trainable, gradients, strict=bool(gradients)):
        if parameter is not weight:
            gradient += logits.sum(0, dtype=gradient.dtype)
        elif gradient.dtype == logits.dtype:
            gradient.addmm_(logits.t(), hidden)
        else:
            gradient += logits.t() @ hidden.to(logits.dtype)
    return values


def _autograd_step(
    head: OutputHead, hidden: Tensor, teacher: Tensor, into: Tensor | None, gradients: list[Tensor]
) -> Tensor:
    """The same for any other head, through its own forward."""
    leaf = hidden.detach().requires_grad_(into is not None)
    with torch.enable_grad():
        logits = head.logits(leaf)
    buffer = logits.detach().clone()
    values = _kl_in_place(buffer, teacher)
    wanted = [*([leaf] if into is not None else []), *(head.trainable if gradients else ())]
    if wanted:
        found = list(torch.autograd.grad(logits, wanted, buffer))
        if into is not None:
            into.copy_(found.pop(0))
        for gradient, part in zip(gradients, found, strict=True):
            gradient += part
    return values


def _kl_in_place(logits: Tensor, teacher: Tensor) -> Tensor:
    weight = torch.ones(len(logits), dtype=torch.float32, device=logits.device)
    # float64 has no kernel: the plain definition keeps all digits.
    kl = _default.kl_divergence_ if logits.dtype == torch.float64 else kl_divergence_
    return kl(logits, teacher, weight)

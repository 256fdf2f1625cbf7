"""The signature's definition: one sample at a time, full forward and backward, no cache."""

from __future__ import annotations

import copy

import torch
from builders import true_float64
from torch import Tensor, nn

from gradsafe.models import Encoded


def hidden_and_gradients(model: nn.Module, item: Encoded) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer `[T, d]` hidden states and gradients of the model's own mean loss, float64."""
    exact = copy.deepcopy(model).double().eval()
    for parameter in exact.parameters():
        parameter.requires_grad_(True)
    ids = torch.tensor([item.input_ids])
    labels = ids.clone()
    labels[:, : item.prompt_length] = -100
    with true_float64():
        output = exact(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False)
        states = list(output.hidden_states)
        gradients = torch.autograd.grad(output.loss, states)
    return [s[0].detach() for s in states], [g[0] for g in gradients]


def signature(model: nn.Module, item: Encoded, layer: int) -> Tensor:
    states, gradients = hidden_and_gradients(model, item)
    at = item.prompt_length - 1
    return torch.cat([states[layer][at], gradients[layer][at]])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest error of the two halves, each relative to its own norm."""
    half = found.shape[-1] // 2
    errors = [
        (found[..., part].double() - expected[..., part]).norm() / expected[..., part].norm()
        for part in (slice(0, half), slice(half, None))
    ]
    return float(max(errors))

"""Fused experts: their x and dy through transformers' own interface for experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gradsafe.models.candidates import LinearLayer
from gradsafe.models.compat import has_gate

IMPLEMENTATION = "gradsafe_capture"

# The public property would also change the configs of other towers.
_SETTING = "_experts_implementation_internal"


@dataclass(frozen=True)
class Routing:
    """Which token and which expert each of N rows belongs to.

    Attributes:
        tokens: `[N]` int64, b * T + t; None where only the sample is known (then B is 1).
        experts: `[N]` int64, ascending; rows of one expert are in the order of their tokens.
        samples: B.
        width: T.
    """

    tokens: Tensor | None
    experts: Tensor
    samples: int
    width: int


# observe(layer, output, x, tokens, experts, total) returns the output to continue with; tokens and
# experts are as in `Routing`, total is the number of tokens that the module sees.
Observe = Callable[[LinearLayer, Tensor, Tensor, Tensor, Tensor, int], Tensor]

# What observes a weight, by id of the experts module and name of the weight.
_taps: dict[tuple[int, str], Callable[..., Tensor]] = {}


def stacked_parameters(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Fused weights that the interface reaches: name to (E, O, I); empty for other modules."""
    gated = has_gate(module)
    if gated is None or not hasattr(getattr(module, "config", None), _SETTING):
        return {}
    found = {}
    for name in ("gate_up_proj" if gated else "up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3 or not weight.is_floating_point():
            return {}
        experts, first, second = weight.shape
        found[name] = (experts, second, first) if module.is_transposed else (experts, first, second)
    return found


@contextmanager
def replaced_experts(layers: Sequence[LinearLayer], observe: Observe) -> Iterator[None]:
    """Run the modules of these layers through `experts_forward`; `observe` sees their products."""
    if not layers:
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    taps = {(id(layer.module), layer.parameter): partial(observe, layer) for layer in layers}
    configs: dict[int, Any] = {id(c): c for c in (layer.module.config for layer in layers)}
    before = {key: getattr(config, _SETTING) for key, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, _SETTING, IMPLEMENTATION)
        _taps.update(taps)
        yield
    finally:
        for key in taps:
            _taps.pop(key, None)
        for config in configs.values():
            setattr(config, _SETTING, before[id(config)])


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The interface's arithmetic with rows sorted by expert, then token.

    Args:
        module: Experts module with the flags of the interface.
        hidden_states: `[T, H]`.
        top_k_index: `[T, k]` int64, experts of each token; E and above mean none.
        top_k_weights: `[T, k]`, factors of their outputs.

    Returns:
        `[T, H]`, dtype of `hidden_states`.
    """
    gated = has_gate(module)
    up_name = "gate_up_proj" if gated else "up_proj"
    count, width = getattr(module, up_name).shape[0], top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(experts.clamp(max=count), minlength=count + 1).tolist()[:count]
    used = sum(counts)
    experts, chosen = experts[:used], order[:used]
    tokens = chosen // width

    def project(name: str, x: Tensor) -> Tensor:
        output = _grouped_linear(x, getattr(module, name), counts, module.is_transposed)
        if (id(module), name) in _taps:
            output = _taps[id(module), name](output, x, tokens, experts, len(top_k_index))
        return output + getattr(module, f"{name}_bias")[experts] if module.has_bias else output

    inner = project(up_name, hidden_states[tokens])
    inner = module._apply_gate(inner) if gated else module.act_fn(inner)
    output = project("down_proj", inner)
    if getattr(module, "has_post_expert_norm", False):
        output = module.post_expert_norm(output)
    output = output * top_k_weights.reshape(-1)[chosen, None]
    # One slot per choice, summed in the order of the choices: no atomic additions.
    slots = output.new_zeros(len(order), output.shape[1]).index_copy(0, chosen, output)
    return slots.unflatten(0, (-1, width)).sum(1).to(hidden_states.dtype)


def _grouped_linear(x: Tensor, weight: Tensor, counts: list[int], transposed: bool) -> Tensor:
    """Rows of each expert times its matrix; `weight` `[E, O, I]`, or `[E, I, O]` if transposed."""
    x = x.to(weight.dtype)
    if _has_grouped_kernel(x, weight):
        ends = torch.tensor(counts, device=x.device).cumsum(0).to(torch.int32)
        return functional.grouped_mm(x, weight if transposed else weight.transpose(1, 2), offs=ends)
    parts = [
        part @ weight[e] if transposed else functional.linear(part, weight[e])
        for e, part in enumerate(x.split(counts))
        if len(part)
    ]
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[2 if transposed else 1])


def _has_grouped_kernel(x: Tensor, weight: Tensor) -> bool:
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and aligned
        and hasattr(functional, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )

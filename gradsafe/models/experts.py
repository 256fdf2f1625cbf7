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
from gradsafe.models.threads import own

IMPLEMENTATION = "gradsafe_capture"

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
    """Run the modules of these layers through `experts_forward`; `observe` sees their products.

    In this thread only: others find the implementation that the config names.
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    taps: dict[Any, dict[str, Callable[..., Tensor]]] = {}
    for layer in layers:
        taps.setdefault(layer.module, {})[layer.parameter] = partial(observe, layer)
    before = {module: module.config for module in taps}
    try:
        for module, config in before.items():
            module.config = _ConfigWithTaps(config, taps[module])
        yield
    finally:
        for module, config in before.items():
            module.config = config


class _ConfigWithTaps:
    """The config of an experts module that names `experts_forward` in the thread that made it.

    The config itself stays as it is: other modules and threads read it, `generate` writes to it.
    """

    def __init__(self, config: Any, taps: dict[str, Callable[..., Tensor]]) -> None:
        vars(self).update(config=config, taps=taps, choose=own(lambda: IMPLEMENTATION))

    @property
    def _experts_implementation(self) -> Any:
        return self.choose() or self.config._experts_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.config, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy of a module gets a copy of the config."""
        return self.config.__reduce_ex__(protocol)


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
    gated, taps = has_gate(module), module.config.taps
    up_name = "gate_up_proj" if gated else "up_proj"
    count, width = getattr(module, up_name).shape[0], top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(experts.clamp(max=count), minlength=count + 1).tolist()[:count]
    used = sum(counts)
    experts, chosen = experts[:used], order[:used]
    tokens = chosen // width

    def project(name: str, x: Tensor) -> Tensor:
        output = _grouped_linear(x, getattr(module, name), counts, module.is_transposed)
        if name in taps:
            output = taps[name](output, x, tokens, experts, len(top_k_index))
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

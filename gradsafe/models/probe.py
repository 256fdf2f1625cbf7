"""One small pass shows how a model uses each weight, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.models.candidates import Candidate, Use
from gradsafe.models.experts import stacked_parameters
from gradsafe.models.inspection import base_model, forward_parameters, input_device, text_config
from gradsafe.models.layout import Layout, find_layout
from gradsafe.models.linear import linear_shape
from gradsafe.models.modes import evaluating, frozen
from gradsafe.models.products import Product, watch

SAMPLES, TOKENS = 3, 7  # sizes that no model is likely to have elsewhere
SHORT = 5  # tokens of a padded text

UNUSED = "takes no part in a pass over text"
NO_GRADIENT = "has no gradient (its output only chooses)"
ROUTED = "list of experts (routed tokens)"
SHARED_INPUT = "its input has no axis of samples"
NO_PRODUCT = "not used in a product that is supported"
OTHER = "used in different ways"


@dataclass
class Usage:
    """What the pass has shown of one weight.

    Attributes:
        use: How its x and dy are reached; None where it cannot be scored.
        reason: Why not.
        shape: (E, O, I); E is 0 for a plain matrix.
        transposed: Whether a product's weight stores `[I, O]`.
        layout: Layout of its input; None for rows that only belong to a sample when it is alone.
    """

    use: Use | None = None
    reason: str = UNUSED
    shape: tuple[int, int, int] = (0, 0, 0)
    transposed: bool = False
    layout: Layout | None = None
    reached: bool = False


def observe(model: nn.Module, candidates: Sequence[Candidate]) -> tuple[dict[str, Usage], bool]:
    """Run a few tokens through the model and note what each candidate does.

    Args:
        model: A causal language model, PEFT wrapper or not.
        candidates: Its weights.

    Returns:
        Usages by name of the candidate, and whether padding leaves a sample's logits alone. A model
        whose weights are on the "meta" device cannot run: there linear modules are taken as called
        with `[B, T, I]`.

    Raises:
        ValueError: The forward pass fails.
    """
    usages = {c.name: Usage() for c in candidates}
    for candidate in candidates:
        stack = stacked_parameters(candidate.module).get(candidate.parameter)
        if stack is not None:
            transposed = bool(candidate.module.is_transposed)
            usages[candidate.name] = Usage("experts", "", stack, transposed, Layout())
    if _cannot_run(model):
        for candidate in candidates:
            shape = linear_shape(candidate.module)
            if shape is not None:
                usages[candidate.name] = Usage("call", "", (0, *shape), False, Layout())
        return usages, True
    open_ = [c for c in candidates if usages[c.name].use is None]
    fused = [c for c in candidates if usages[c.name].use is not None]
    with ExitStack() as stack_:
        for handle in (*_hooks(open_, usages), *_expert_hooks(fused, usages)):
            stack_.callback(handle.remove)
        stack_.enter_context(frozen(model))
        stack_.enter_context(evaluating(model, ()))
        with torch.inference_mode(False), torch.enable_grad():
            _run(model)
    with evaluating(model, ()):
        padding = _padding_is_harmless(model)
    _mark_routed(open_, usages)
    for candidate in candidates:
        usage = usages[candidate.name]
        if usage.reason == UNUSED and linear_shape(candidate.module) is None:
            usage.reason = NO_PRODUCT
        if usage.use is not None and not usage.reached:
            usage.use, usage.reason = None, NO_GRADIENT
    return usages, padding


def _cannot_run(model: nn.Module) -> bool:
    parameters = list(model.parameters())
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not offloaded and any(p.device.type == "meta" for p in parameters)


def _run(model: nn.Module) -> None:
    """Run the pass and its backward."""
    base, ids = base_model(model), _ids(model)
    try:
        logits = _logits(base, ids, TOKENS)
        if logits.requires_grad:
            logits.float().sum().backward()
    except Exception as error:
        raise ValueError(
            f"gradsafe.find_layers: {type(base).__name__} fails on {SAMPLES} texts of {TOKENS} "
            f"tokens ({type(error).__name__}: {error}); a decoder that reads text alone is needed"
        ) from error


def _padding_is_harmless(model: nn.Module) -> bool:
    """Whether the logits of a text are the same with padding behind it, but for rounding."""
    base, ids = base_model(model), _ids(model)
    with torch.no_grad():
        alone, padded = _logits(base, ids[:1, :SHORT], SHORT), _logits(base, ids, SHORT)
    if alone.ndim != 3 or padded.shape[1] != TOKENS:
        return True
    rounding = 1e-4 if alone.dtype in (torch.float32, torch.float64) else 0.1
    alone, padded = alone.float(), padded[:1, :SHORT].float()
    return bool((alone - padded).norm() <= rounding * alone.norm())


def _ids(model: nn.Module) -> Tensor:
    """`[SAMPLES, TOKENS]` token ids, none of them special."""
    config = text_config(model)
    special = {value for name, value in vars(config).items() if name.endswith("token_id")}
    size = getattr(config, "vocab_size", None) or 100
    usable = [i for i in range(min(size, 100)) if i not in special] or [0]
    ids = torch.tensor([usable[i % len(usable)] for i in range(SAMPLES * TOKENS)])
    return ids.view(SAMPLES, TOKENS).to(input_device(model) or "cpu")


def _logits(base: Any, ids: Tensor, real: int) -> Tensor:
    """Logits of a batch whose first row has `real` tokens and padding behind them."""
    mask = torch.ones_like(ids)
    mask[0, real:] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in forward_parameters(base):
        inputs["position_ids"] = (mask.cumsum(1) - 1) * mask
    output = base(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]


def _hooks(candidates: Sequence[Candidate], usages: dict[str, Usage]) -> Any:
    def called(candidate: Candidate) -> Any:
        shape = linear_shape(candidate.module)

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if shape is None or x is None or not isinstance(output, Tensor):
                return output
            if tuple(output.shape) == (*x.shape[:-1], shape[0]) and x.shape[-1] == shape[1]:
                layout = find_layout(x.shape, SAMPLES, TOKENS)
                _note(usages[candidate.name], "call", (0, *shape), False, layout)
            return _noted(output, [usages[candidate.name]])

        return hook

    def multiplied(key: str, product: Product | None, x: Tensor, output: Tensor) -> Tensor:
        usage = usages[key]
        if usage.use == "call":
            return output
        if product is None or not isinstance(x, Tensor):
            usage.use, usage.reason = None, OTHER
            return output
        shape = (product.stack, product.out_features, product.in_features)
        lead = x.shape[1:] if product.matrices > 1 else x.shape
        layout = find_layout(lead, SAMPLES, TOKENS)
        if product.stack == 1:
            _note(usage, "product", (0, *shape[1:]), product.transposed, layout)
        else:
            _note_stack(usage, shape, product.transposed, layout)
        return _noted(output, [usage])

    weights = [(c.name, c.module, c.parameter, c.around) for c in candidates if _is_plain(c)]
    yield from watch(weights, multiplied)
    for candidate in candidates:
        if linear_shape(candidate.module) is not None:
            for module in (candidate.module, *candidate.twins):
                yield module.register_forward_hook(called(candidate), with_kwargs=True)


def _expert_hooks(candidates: Sequence[Candidate], usages: dict[str, Usage]) -> Any:
    members: dict[int, tuple[nn.Module, list[Usage]]] = {}
    for candidate in candidates:
        _, group = members.setdefault(id(candidate.module), (candidate.module, []))
        group.append(usages[candidate.name])
    for module, group in members.values():
        yield module.register_forward_hook(lambda m, args, out, group=group: _noted(out, group))


def _noted(output: Any, usages: list[Usage]) -> Any:
    """An output whose gradient, if it gets one, marks the weights as reached."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    if not torch.is_grad_enabled():  # the model switched gradients off here
        return output
    if not output.requires_grad:
        output.requires_grad_(True)
    output = output.clone()  # models may write to it

    def mark(gradient: Tensor) -> None:
        for usage in usages:
            usage.reached = True

    output.register_hook(mark)
    return output


def _is_plain(candidate: Candidate) -> bool:
    """Whether the weight is a plain parameter, neither packed nor behind an adapter."""
    weight = candidate.module._parameters.get(candidate.parameter)
    return weight is not None and weight.is_floating_point()


def _note(
    usage: Usage,
    use: Use,
    shape: tuple[int, int, int],
    transposed: bool,
    layout: Layout | None,
) -> None:
    """A whole weight was used; a call of its module says more than the product inside it."""
    if usage.reason not in ("", UNUSED) and use == "product":
        return
    if layout is not None and usage.use == use and usage.layout is not None:
        layout = layout.common(usage.layout)
    if layout is None:
        usage.use, usage.reason = None, SHARED_INPUT
        return
    usage.use, usage.reason = use, ""
    usage.shape, usage.transposed, usage.layout = shape, transposed, layout


def _note_stack(
    usage: Usage, shape: tuple[int, int, int], transposed: bool, layout: Layout | None
) -> None:
    """A part of a weight was used; rows without a layout belong to a sample that is alone."""
    if usage.reason not in ("", UNUSED):
        return
    if usage.use is not None and (usage.shape, usage.transposed) != (shape, transposed):
        usage.use, usage.reason = None, OTHER
        return
    first = usage.use is None
    usage.use, usage.reason = "product", ""
    usage.shape, usage.transposed = shape, transposed
    usage.layout = layout if first or usage.layout == layout else None


def _mark_routed(candidates: Sequence[Candidate], usages: dict[str, Usage]) -> None:
    """Modules of a list that see some tokens only, all or none of them."""
    odd = {
        c.listed
        for c in candidates
        if c.listed and (usages[c.name].use is None) and usages[c.name].reason != OTHER
    }
    for candidate in candidates:
        if candidate.listed in odd and linear_shape(candidate.module) is not None:
            usages[candidate.name] = Usage(reason=ROUTED)

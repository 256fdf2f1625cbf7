"""One small pass shows how a model uses each weight, whatever its family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.models.candidates import UNUSED, Candidate, Use
from gradsafe.models.experts import stacked_parameters
from gradsafe.models.inspection import base_model, forward_parameters, input_device, text_config
from gradsafe.models.layout import Layout, find_layout
from gradsafe.models.linear import linear_shape
from gradsafe.models.modes import evaluating, frozen
from gradsafe.models.opening import Opening, obstacle
from gradsafe.models.products import Product, watch_calls, watch_products
from gradsafe.models.threads import alone, own

SAMPLES, TOKENS = 3, 7  # sizes that no model is likely to have elsewhere
SHORT = 5  # tokens of a padded text

NO_GRADIENT = "has no gradient (its output only chooses)"
ROUTED = "list of experts (routed tokens)"
SHARED_INPUT = "its input has no axis of samples"
NO_PRODUCT = "not used in a product that is supported"
OTHER = "used in different ways"


def observe(model: nn.Module, candidates: Sequence[Candidate]) -> tuple[bool, bool]:
    """Run a few tokens through the model and note how it uses each candidate.

    A model whose weights are on the "meta" device cannot run: there linear modules are assumed to
    be called with `[B, T, I]`.

    The results are written into the candidates. Returns whether padding leaves a sample's logits
    unchanged, and whether texts continue an opening. ValueError if the forward pass fails.
    """
    for candidate in candidates:
        stack = stacked_parameters(candidate.module).get(candidate.parameter)
        if stack is not None:
            candidate.accept("experts", stack, bool(candidate.module.is_transposed), Layout())
    if _cannot_run(model):
        for candidate in candidates:
            shape = linear_shape(candidate.module)
            if shape is not None:
                candidate.accept("call", (0, *shape), False, Layout())
        return True, False
    single = [c for c in candidates if c.use is None]
    fused = [c for c in candidates if c.use is not None]
    with alone(model), evaluating(model):
        with frozen(model), ExitStack() as handles:
            for handle in (*_hooks(single), *_expert_hooks(fused)):
                handles.callback(handle.remove)
            with torch.inference_mode(False), torch.enable_grad():
                _run(model)
        padding = _padding_is_harmless(model)
        continues = padding and _continues(model)
    _mark_routed(single)
    for candidate in candidates:
        if candidate.reason == UNUSED and linear_shape(candidate.module) is None:
            candidate.refuse(NO_PRODUCT)
        if candidate.use is not None and not candidate.reached:
            candidate.refuse(NO_GRADIENT)
    return padding, continues


def _cannot_run(model: nn.Module) -> bool:
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not offloaded and any(p.device.type == "meta" for p in model.parameters())


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
    return _same(alone, padded[:1, :SHORT])


def _continues(model: nn.Module) -> bool:
    """Whether texts behind a common opening have the logits of whole texts, but for rounding."""
    if obstacle(model) is not None:
        return False
    base, ids = base_model(model), _ids(model)
    ids[1:, :SHORT] = ids[0, :SHORT]
    try:
        opening = Opening(base, ids[0, :SHORT].tolist())
        with torch.no_grad():
            whole = _logits(base, ids, SHORT + 1)[:, SHORT:]
            for _ in range(2):  # the first pass must leave the opening as it is
                parts = _logits(base, ids[:, SHORT:], 1, opening)
    except Exception:  # whatever its cache lacks: whole texts do not need one
        return False
    whole[0, 1:], parts[0, 1:] = 0, 0  # padding
    return whole.shape == parts.shape and _same(whole, parts)


def _same(a: Tensor, b: Tensor) -> bool:
    rounding = 1e-4 if a.dtype in (torch.float32, torch.float64) else 0.1
    a, b = a.float(), b.float()
    return bool((a - b).norm() <= rounding * a.norm())


def _ids(model: nn.Module) -> Tensor:
    """`[SAMPLES, TOKENS]` token ids, none of them special."""
    config = text_config(model)
    special = {value for name, value in vars(config).items() if name.endswith("token_id")}
    size = getattr(config, "vocab_size", None) or 100
    usable = [i for i in range(min(size, 100)) if i not in special] or [0]
    ids = torch.tensor([usable[i % len(usable)] for i in range(SAMPLES * TOKENS)])
    return ids.view(SAMPLES, TOKENS).to(input_device(model) or "cpu")


def _logits(base: Any, ids: Tensor, real: int, opening: Opening | None = None) -> Tensor:
    """Logits of a batch whose first row has `real` tokens and padding behind them."""
    mask = torch.ones_like(ids)
    mask[0, real:] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in forward_parameters(base):
        inputs["position_ids"] = (mask.cumsum(1) - 1) * mask
    if opening is not None:
        opening.precede(inputs)
    output = base(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]


def _hooks(candidates: Sequence[Candidate]) -> Iterator[Any]:
    # Plain parameters only, neither packed nor behind an adapter.
    weights = [(c, c.module._parameters.get(c.parameter)) for c in candidates]
    plain = [c for c, weight in weights if weight is not None and weight.is_floating_point()]
    yield from watch_products(plain, _multiplied)
    yield from watch_calls((c for c in candidates if linear_shape(c.module) is not None), _called)


def _expert_hooks(candidates: Sequence[Candidate]) -> Iterator[Any]:
    for module in {id(c.module): c.module for c in candidates}.values():
        group = [c for c in candidates if c.module is module]
        hook = own(lambda m, args, out, group=group: _noted(out, group))
        yield module.register_forward_hook(hook)


def _called(candidate: Candidate, module: nn.Module, x: Tensor | None, output: Any) -> Any:
    shape = linear_shape(candidate.module)
    if shape is None or x is None or not isinstance(output, Tensor):
        return output
    if tuple(output.shape) == (*x.shape[:-1], shape[0]) and x.shape[-1] == shape[1]:
        layout = find_layout(x.shape, SAMPLES, TOKENS)
        _note(candidate, "call", (0, *shape), False, layout)
    return _noted(output, [candidate])


def _multiplied(candidate: Candidate, product: Product | None, x: Tensor, output: Tensor) -> Tensor:
    if candidate.use == "call":
        return output
    if product is None or not isinstance(x, Tensor):
        candidate.refuse(OTHER)
        return output
    lead = x.shape[1:] if product.matrices > 1 else x.shape
    layout = find_layout(lead, SAMPLES, TOKENS)
    size, transposed = (product.out_features, product.in_features), product.transposed
    if product.stack == 1:
        _note(candidate, "product", (0, *size), transposed, layout)
    else:
        _note_stack(candidate, (product.stack, *size), transposed, layout)
    return _noted(output, [candidate])


def _noted(output: Any, candidates: list[Candidate]) -> Any:
    """An output whose gradient, if it gets one, marks the weights as reached."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    if not torch.is_grad_enabled():  # the model switched gradients off here
        return output
    if not output.requires_grad:
        output.requires_grad_(True)
    output = output.clone()  # models may write to it

    def mark(gradient: Tensor) -> None:
        for candidate in candidates:
            candidate.reached = True

    output.register_hook(mark)
    return output


def _note(
    candidate: Candidate,
    use: Use,
    shape: tuple[int, int, int],
    transposed: bool,
    layout: Layout | None,
) -> None:
    """A whole weight was used; a call of its module says more than the product inside it."""
    if candidate.reason not in ("", UNUSED) and use == "product":
        return
    if layout is not None and candidate.use == use and candidate.layout is not None:
        layout = layout.common(candidate.layout)
    if layout is None:
        candidate.refuse(SHARED_INPUT)
    else:
        candidate.accept(use, shape, transposed, layout)


def _note_stack(
    candidate: Candidate, shape: tuple[int, int, int], transposed: bool, layout: Layout | None
) -> None:
    """A part of a weight was used; rows without a layout are only known with one sample."""
    if candidate.reason not in ("", UNUSED):
        return
    if candidate.use is None:
        candidate.accept("product", shape, transposed, layout)
    elif (candidate.shape, candidate.transposed) != (shape, transposed):
        candidate.refuse(OTHER)
    elif candidate.layout != layout:
        candidate.layout = None


def _mark_routed(candidates: Sequence[Candidate]) -> None:
    """Modules of a list that see some tokens only, all or none of them."""
    odd = {c.listed for c in candidates if c.listed and c.use is None and c.reason != OTHER}
    for candidate in candidates:
        if candidate.listed in odd and linear_shape(candidate.module) is not None:
            candidate.refuse(ROUTED)

"""What every family must pass: scores, batching, coverage, a signature and a SafeGrad step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsafe import Detector, GradientSurgery
from gradsafe.models import Encoded, Layers, LinearLayer, collate, encode, find_layers, response_nll
from gradsafe.tracing.signature import signatures

UNSAFE = ["do harm now", "steal it"]
SAFE = ["tell a joke", "add 2+2"]
PROMPTS = ["how to rob", "hi", "a longer question, harmless"]
RESPONSE = "Sure"
TEMPLATE = "{prompt}:"
# Reasons of weights that a pass over text does not use at all.
UNREACHED = "takes no part in a pass over text"
TOLERANCE = 1e-5
NEGLIGIBLE = 1e-6  # of the largest gradient of the prompt


@dataclass
class Result:
    """Outcome of one family.

    Attributes:
        coverage: Scored part of the matrix weights that a pass over text uses.
        experts: Number of scored stacks of experts.
        left_out: Weights that are not scored, and their parts.
        one_at_a_time: Whether prompts do not share batches.
    """

    coverage: float
    experts: int
    left_out: dict[str, float] = field(default_factory=dict)
    one_at_a_time: bool = False


def matrix_coverage(layers: Layers) -> tuple[float, dict[str, float]]:
    """Scored part of the weights with two or more axes that text reaches, and what is left out."""
    scored = {(id(layer.module), layer.parameter) for layer in layers.scored}
    reasons = {s.name.partition("*.")[2]: s.reason for s in layers.skipped}
    total = covered = 0
    left: dict[str, int] = {}
    seen: set[int] = set()
    for path, module in layers.blocks.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or leaf.endswith("bias") or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            rest = ".".join([*path.split(".")[1:], leaf])
            reason = reasons.get(rest, "")
            if reason == UNREACHED:
                continue
            total += parameter.numel()
            if (id(module), leaf) in scored:
                covered += parameter.numel()
            else:
                kind = f"{type(module).__name__}.{leaf} ({reason})"
                left[kind] = left.get(kind, 0) + parameter.numel()
    return covered / max(1, total), {name: count / total for name, count in left.items()}


def as_matrices(layer: LinearLayer, gradient: Tensor) -> Tensor:
    """Gradient of the stored parameter as `[O, I]` or `[E, O, I]`."""
    first, second = layer.out_features, layer.in_features
    lead = (layer.experts,) if layer.experts else ()
    if layer.transposed or isinstance(layer.module, Conv1D):
        return gradient.reshape(*lead, second, first).transpose(-1, -2)
    return gradient.reshape(*lead, first, second)


def autograd_gradients(model: nn.Module, layers: Layers, item: Encoded) -> dict[str, Tensor]:
    """Weight gradients of one prompt alone, plain autograd through the model's own forward."""
    weights = [getattr(layer.module, layer.parameter) for layer in layers.scored]
    flags = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    loss = response_nll(model.eval(), collate([item], 0)).sum()
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    return {
        layer.name: as_matrices(layer, torch.zeros_like(weight) if g is None else g).double()
        for layer, weight, g in zip(layers.scored, weights, gradients, strict=True)
    }


def expected_scores(
    model: nn.Module, layers: Layers, encoded: dict[str, list[Encoded]]
) -> tuple[Tensor, Tensor]:
    """GradCoo by its definition: component values `[n, C]`, float64, and which `[C]` are no noise.

    A gradient that is zero but for rounding, as that of a router whose only weight is normalised
    to one, has no direction that two orders of summation could agree on.
    """

    def mean(items: Sequence[Encoded]) -> dict[str, Tensor]:
        all_ = [autograd_gradients(model, layers, item) for item in items]
        return {name: torch.stack([g[name] for g in all_]).mean(0) for name in all_[0]}

    def normalized(g: Tensor) -> Tensor:
        std = g.std(correction=0)
        return g.abs() / std if std > 0 else torch.zeros_like(g)

    unsafe, safe = (
        {name: normalized(g) for name, g in mean(encoded[key]).items()}
        for key in ("unsafe", "safe")
    )
    rows, norms = [], []
    for item in encoded["prompts"]:
        values = []
        gradients = autograd_gradients(model, layers, item)
        for name, g in gradients.items():
            n = normalized(g)
            a, b = (n * unsafe[name]).sum(), (n * safe[name]).sum()
            values.append(a / (a + b) if a + b > 0 else torch.tensor(0.5).double())
        rows.append(torch.stack(values))
        norms.append(torch.stack([g.norm() for g in gradients.values()]))
    strength = torch.stack(norms)
    return torch.stack(rows), (strength / strength.max()).amin(0) > NEGLIGIBLE


def check_detection(model: nn.Module, tokenizer: Any) -> Result:
    """Scores equal plain autograd, and do not depend on the batches."""
    detector = Detector.fit(
        model,
        tokenizer,
        UNSAFE,
        SAFE,
        response=RESPONSE,
        template=TEMPLATE,
        reference_dtype="float32",
        progress=False,
    )
    scores = detector.score(PROMPTS, progress=False)
    encoded = {
        key: [encode(tokenizer, p, RESPONSE, template=TEMPLATE) for p in prompts]
        for key, prompts in (("unsafe", UNSAFE), ("safe", SAFE), ("prompts", PROMPTS))
    }
    layers = detector.layers
    components, clear = expected_scores(model, layers, encoded)
    errors = ((scores.components - components).abs() * clear).amax(0)
    worst = int(errors.argmax())
    name = layers.scored[worst].name
    assert errors[worst] < 10 * TOLERANCE, f"component {name} is off by {float(errors[worst]):.1e}"
    values = components[:, clear].mean(1)
    error = float((scores.components[:, clear].mean(1) - values).abs().max())
    assert error < TOLERANCE, f"scores differ from autograd by {error:.1e}"
    alone = detector.score(PROMPTS, batch_tokens=1, progress=False)
    change = scores.components[:, clear].mean(1) - alone.components[:, clear].mean(1)
    change = float(change.abs().max())
    assert change < TOLERANCE, f"scores depend on the batch by {change:.1e}"
    coverage, left = matrix_coverage(layers)
    stacks = sum(layer.experts > 0 for layer in layers.scored)
    return Result(coverage, stacks, left, layers.one_at_a_time)


def check_signature(model: nn.Module, tokenizer: Any) -> None:
    """Signatures are finite and do not depend on the batches."""
    items = [encode(tokenizer, p, RESPONSE, template=TEMPLATE) for p in PROMPTS]
    layers = find_layers(model)
    depth = len(layers.blocks)
    together = signatures(model, items, [depth], 0)[depth]
    alone = signatures(model, items, [depth], 0, batch_tokens=1)[depth]
    assert torch.isfinite(together).all()
    for half in together.shape[1] // 2 * torch.arange(3).unfold(0, 2, 1):
        part = slice(*half.tolist())
        error = (together[:, part] - alone[:, part]).norm() / alone[:, part].norm()
        assert error < TOLERANCE, f"signatures depend on the batch by {float(error):.1e}"


def check_safegrad_step(model: nn.Module, tokenizer: Any) -> None:
    """One step of surgery: the merged gradient does not oppose the alignment gradient."""
    user, align = (
        collate([encode(tokenizer, p, RESPONSE, template=TEMPLATE) for p in prompts], 0)
        for prompts in (UNSAFE, SAFE)
    )
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    surgery = GradientSurgery(parameters, rho=1.0)
    response_nll(model, user).sum().backward()
    surgery.stash()
    response_nll(model, align).sum().backward()
    alignment = [None if p.grad is None else p.grad.clone() for p in parameters]
    surgery.merge()
    dot = norm = 0.0
    for parameter, gradient in zip(parameters, alignment, strict=True):
        if gradient is not None and parameter.grad is not None:
            dot += float((parameter.grad.double() * gradient).sum())
            norm += float(gradient.double().square().sum())
    assert norm > 0
    assert dot >= (1 - 1e-4) * norm, "the merged gradient opposes the alignment gradient"


CHECKS: dict[str, Callable[[nn.Module, Any], Result | None]] = {
    "detect": check_detection,
    "trace": check_signature,
    "SafeGrad": check_safegrad_step,
}


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings that random models cause."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

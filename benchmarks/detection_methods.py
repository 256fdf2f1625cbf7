"""Scoring methods: each prepares references and returns a scorer and the bytes it keeps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.detection_models import TEMPLATE
from gradsafe import Detector
from gradsafe.ops import moments

Score = Callable[[list[str]], object]
Prepared = tuple[Score, int]  # scorer and bytes of its references
RESPONSE = "w2"


def _loss_of(model: nn.Module, tokenizer: Any, prompt: str) -> Tensor:
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer(f"{prompt} {RESPONSE}").input_ids], device=device)
    labels = ids.clone()
    labels[:, :-1] = -100
    return model(input_ids=ids, labels=labels).loss


def _scored(model: nn.Module) -> dict[str, nn.Parameter]:
    """The published choice: parameters whose name contains "mlp" or "self"."""
    return {n: p for n, p in model.named_parameters() if "mlp" in n or "self" in n}


def _mean_gradients(model: nn.Module, tokenizer: Any, prompts: list[str]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    for prompt in prompts:
        (_loss_of(model, tokenizer, prompt) / len(prompts)).backward()
    gradients = {n: p.grad.clone() for n, p in _scored(model).items()}
    model.zero_grad(set_to_none=True)
    return gradients


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def gradsafe_loop(
    model: nn.Module, tokenizer: Any, unsafe: list[str], safe: list[str], batch: int
) -> Prepared:
    """The published GradSafe loop, rewritten: one prompt at a time, all gradients, Python lists.

    All slices are used because none of a random model separates the prompts; the published code
    computes all of them before it selects some. It also creates one optimizer per prompt.
    """
    reference = _mean_gradients(model, tokenizer, unsafe)
    cosine = nn.functional.cosine_similarity

    def score(prompts: list[str]) -> list[float]:
        scores = []
        for prompt in prompts:
            torch.optim.SGD(model.parameters(), lr=0.0).zero_grad()
            _loss_of(model, tokenizer, prompt).backward()
            values: list[float] = []
            for name, parameter in _scored(model).items():
                grad, ref = parameter.grad, reference[name]
                for dim in (1, 0):
                    values += cosine(grad, ref, dim=dim).nan_to_num(0).cpu().tolist()
            scores.append(sum(values) / len(values))
        model.zero_grad(set_to_none=True)
        return scores

    return score, _bytes(reference.values())


def _gradcoo_loop(
    model: nn.Module,
    tokenizer: Any,
    unsafe: list[str],
    safe: list[str],
    shares: Callable[[list[Tensor], list[list[Tensor]]], Tensor],
) -> Prepared:
    """GradCoo over stored gradients; `shares(gradients, references of each)` gives the shares."""
    references = []
    for prompts in (unsafe, safe):
        mean = _mean_gradients(model, tokenizer, prompts)
        references.append({n: (g / g.std(correction=0)).abs() for n, g in mean.items()})
    scored = _scored(model)
    pairs = [[reference[name] for reference in references] for name in scored]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in scored.values():
        parameter.requires_grad_(True)

    def score(prompts: list[str]) -> list[float]:
        scores = []
        for prompt in prompts:
            _loss_of(model, tokenizer, prompt).backward()
            found = shares([p.grad for p in scored.values()], pairs)
            scores.append(float(found.mean()))
            model.zero_grad(set_to_none=True)
        return scores

    return score, _bytes(r for pair in pairs for r in pair)


def gradcoo_eager(
    model: nn.Module, tokenizer: Any, unsafe: list[str], safe: list[str], batch: int
) -> Prepared:
    """GradCoo in plain PyTorch: gradients of the scored weights, std, abs, two dot products."""

    def shares(grads: list[Tensor], pairs: list[list[Tensor]]) -> Tensor:
        found = []
        for grad, pair in zip(grads, pairs, strict=True):
            normalized = (grad / grad.std(correction=0)).abs()
            a, b = ((normalized * r).sum() for r in pair)
            found.append(a / (a + b))
        return torch.stack(found)

    return _gradcoo_loop(model, tokenizer, unsafe, safe, shares)


def gradcoo_moments(
    model: nn.Module, tokenizer: Any, unsafe: list[str], safe: list[str], batch: int
) -> Prepared:
    """The same gradients, stored by autograd and scored by `gradsafe.ops.moments`."""

    def shares(grads: list[Tensor], pairs: list[list[Tensor]]) -> Tensor:
        dots = torch.stack(moments(grads, pairs).dots)
        return dots[:, 0] / dots.sum(1)

    return _gradcoo_loop(model, tokenizer, unsafe, safe, shares)


def ours(part: bool = False, **options: Any) -> Callable[..., Prepared]:
    """`Detector.score`; with `part` only 1/4 of the rows of the last half of the blocks."""

    def prepare(
        model: nn.Module, tokenizer: Any, unsafe: list[str], safe: list[str], batch: int
    ) -> Prepared:
        chosen = dict(options)
        if part:
            half = max(1, model.config.num_hidden_layers // 2)
            chosen |= {"row_fraction": 0.25, "layers": half}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a random model does not refuse: fit warns
            detector = Detector.fit(
                model, tokenizer, unsafe, safe, response=RESPONSE, template=TEMPLATE,
                progress=False, **chosen,
            )  # fmt: skip
        kept = 0
        if detector.method is not None:
            groups = [detector.method.references(layer) for layer in detector.layers.scored]
            kept = _bytes(r for group in groups for r in group)

        def score(prompts: list[str]) -> object:
            length = len(prompts[0].split()) + 1
            return detector.score(prompts, batch_tokens=batch * length, progress=False)

        return score, kept

    return prepare


@dataclass(frozen=True)
class Method:
    """A scoring method; the loops take one prompt at a time."""

    prepare: Callable[..., Prepared]
    batched: bool = True


METHODS: dict[str, Method] = {
    "gradsafe loop": Method(gradsafe_loop, batched=False),
    "gradcoo eager": Method(gradcoo_eager, batched=False),
    "gradcoo, autograd + moments": Method(gradcoo_moments, batched=False),
    "gradsafe.Detector": Method(ours()),
    "Detector, 1/4 rows, last half": Method(ours(part=True)),
    "Detector, NLL only": Method(ours(method="nll")),
}

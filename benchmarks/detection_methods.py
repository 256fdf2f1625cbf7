"""Ways to score prompts, each as `prepare(...) -> score(prompts)`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.detection_models import TEMPLATE
from gradsafe import Detector

Score = Callable[[list[str]], object]
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


def gradsafe_loop(model: nn.Module, tokenizer: Any, unsafe: list[str], safe: list[str]) -> Score:
    """The published GradSafe loop, retold: one prompt at a time, all gradients, Python lists.

    Every slice counts (a random model has none that separates), which is the cost before the
    boolean index; the published code also makes an optimizer object per prompt.
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

    return score


def gradcoo_eager(model: nn.Module, tokenizer: Any, unsafe: list[str], safe: list[str]) -> Score:
    """GradCoo as one writes it: gradients of the scored weights, then std, abs and two dots."""
    references = []
    for prompts in (unsafe, safe):
        mean = _mean_gradients(model, tokenizer, prompts)
        references.append({n: (g / g.std(correction=0)).abs() for n, g in mean.items()})
    scored = _scored(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in scored.values():
        parameter.requires_grad_(True)

    def score(prompts: list[str]) -> list[float]:
        scores = []
        for prompt in prompts:
            _loss_of(model, tokenizer, prompt).backward()
            shares = []
            for name, parameter in scored.items():
                normalized = (parameter.grad / parameter.grad.std(correction=0)).abs()
                a, b = ((normalized * r[name]).sum() for r in references)
                shares.append(a / (a + b))
            scores.append(float(torch.stack(shares).mean()))
            model.zero_grad(set_to_none=True)
        return scores

    return score


def ours(batch: int, **options: Any) -> Callable[..., Score]:
    """`Detector.score` with `batch` prompts at a time."""

    def prepare(model: nn.Module, tokenizer: Any, unsafe: list[str], safe: list[str]) -> Score:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a random model refuses nothing
            detector = Detector.fit(
                model, tokenizer, unsafe, safe, response=RESPONSE, template=TEMPLATE,
                progress=False, **options,
            )  # fmt: skip
        return lambda prompts: detector.score(
            prompts, batch_tokens=batch * (len(prompts[0].split()) + 1), progress=False
        )

    return prepare


METHODS: dict[str, Callable[..., Score]] = {
    "gradsafe loop": gradsafe_loop,
    "gradcoo eager": gradcoo_eager,
    "ours b1": ours(1),
    "ours b4": ours(4),
    "ours b16": ours(16),
    "ours b16 half layers": ours(16),  # the caller sets layers to the last half
    "nll b16": ours(16, method="nll"),
}

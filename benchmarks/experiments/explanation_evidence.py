"""Every kind of evidence of `explanations`, for one prompt."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsafe import Detector
from gradsafe.models import prompt_span, token_texts
from gradsafe.models.pieces import probe_prompts

STEPS = 8  # of the path of integrated gradients
NEUTRAL = " the"


class Evidence:
    """All kinds of evidence of one prompt."""

    def __init__(self, model: Any, tokenizer: Any, detector: Detector) -> None:
        self.model, self.tokenizer, self.detector = model, tokenizer, detector
        self.nll = Detector.fit(model, tokenizer, method="nll", progress=False)
        model.set_attn_implementation("eager")  # others have no second derivative, and no weights
        self.embed = model.get_input_embeddings()
        method = detector.method
        assert detector.config.granularity == "tensor"
        self.layers = detector.layers.scored
        self.references = {}
        for layer in self.layers:
            _, index = method.components[layer]
            stored = zip(method.references(layer), method.scales(layer), method.stds, strict=True)
            self.references[layer] = [
                r.float() * scale / float(std[index]) for r, scale, std in stored
            ]

    def __call__(self, prompt: str, seed: int) -> dict[str, list[float]]:
        """Evidence of every word of `words(prompt)`."""
        gradients = self.detector._gradients(batch_tokens=1, progress=False)
        (item,) = gradients.encode([prompt], ["prompt"]).items
        span = prompt_span(item, gradients.encode(probe_prompts(prompt), "probe").items)
        ids, start = torch.tensor([item.input_ids]), item.prompt_length
        neutral = ids.clone()
        neutral[0, span] = self.tokenizer(NEUTRAL, add_special_tokens=False).input_ids[0]
        full, empty = self.embed(ids).detach(), self.embed(neutral).detach()

        here = self._pass(full, ids, start)
        there = self._pass(empty, neutral, start)
        path = [
            self._pass(empty + (step + 0.5) / STEPS * (full - empty), ids, start)["gradient"]
            for step in range(STEPS)
        ]
        integrated = torch.stack(path).mean(0) * (full - empty)[0]
        tokens = {
            "position": here["position"],
            "position, less a neutral prompt": here["position"] - there["position"],
            "position, carried back by attention": here["carried"],
            "gradient x input": (here["gradient"] * full[0]).sum(-1),
            "integrated gradients": integrated.sum(-1),
        }
        texts = token_texts(self.tokenizer, item.input_ids)[span]
        found = {kind: by_word(prompt, texts, values[span]) for kind, values in tokens.items()}
        for kind, detector in (("deletion", self.detector), ("deletion, NLL", self.nll)):
            found[kind] = by_deletion(detector, prompt)
        found["random"] = np.random.default_rng(seed).random(len(words(prompt))).tolist()
        return found

    def _pass(self, inputs: Tensor, ids: Tensor, start: int) -> dict[str, Tensor]:
        """Evidence per position, and the gradient of the sum of all evidence at `inputs`."""
        inputs = inputs.clone().requires_grad_()
        seen: dict[Any, tuple[Tensor, Tensor]] = {}
        handles = [
            layer.module.register_forward_hook(
                lambda _, args, out, layer=layer: seen.__setitem__(layer, (args[0], out))
            )
            for layer in self.layers
        ]
        try:
            output = self.model(inputs_embeds=inputs, output_attentions=True, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        logits = output.logits[0, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, start:])
        outputs = [seen[layer][1] for layer in self.layers]
        above = torch.autograd.grad(loss, outputs, create_graph=True)
        total = torch.zeros((), dtype=torch.float64)
        depth, length = len(output.attentions), ids.shape[1]
        positions = torch.zeros(depth, length, dtype=torch.float64)
        for layer, dy in zip(self.layers, above, strict=True):
            x, dy = seen[layer][0][0], dy[0]
            gradient = (dy.t() @ x).detach()
            unsafe, safe = self.references[layer]
            a, b = (float((gradient.abs() * r).sum()) for r in (unsafe, safe))
            share = 1 / ((a + b) * len(self.layers))
            fixed = gradient.sign() * (unsafe - safe) * share
            positions[layer.block] += ((dy.detach() @ fixed) * x.detach()).sum(1).double()
            slope = gradient.sign() * (b * unsafe - a * safe) * (2 * share / (a + b))
            total = total + ((dy @ slope) * x).sum()
        (found,) = torch.autograd.grad(total, inputs)
        return {
            "position": positions.sum(0),
            "carried": carried(positions, output.attentions),
            "gradient": found[0].detach(),
        }


def carried(positions: Tensor, attentions: tuple[Tensor, ...]) -> Tensor:
    """Evidence `[blocks, T]` of positions, moved to the tokens by attention rollout."""
    length = positions.shape[1]
    rollout = torch.eye(length, dtype=torch.float64)
    total = torch.zeros(length, dtype=torch.float64)
    for evidence, attention in zip(positions, attentions, strict=True):
        mixed = (attention[0].detach().double().mean(0) + torch.eye(length)) / 2
        rollout = mixed @ rollout
        total += evidence @ rollout
    return total


def words(text: str) -> list[str]:
    """The words of a text, each with the space before it."""
    return re.findall(r"\s*\S+", text)


def join(text: str, kept: list[int]) -> str:
    """The text with some of its words."""
    parts = words(text)
    return "".join(parts[i] for i in kept).strip()


def by_word(text: str, tokens: list[str], evidence: Tensor) -> list[float]:
    """Sums of the evidence of tokens over words: a token belongs to the word that it ends in."""
    ends = np.cumsum([len(word) for word in words(text)])
    sums, place = [0.0] * len(ends), 0
    for token, value in zip(tokens, evidence.tolist(), strict=True):
        place += len(token)
        sums[min(int(np.searchsorted(ends, max(1, place))), len(ends) - 1)] += value
    return sums


def by_deletion(detector: Detector, prompt: str) -> list[float]:
    """Evidence "deletion" of every word."""
    found = detector.explain(prompt, evidence="deletion", progress=False)
    assert found.tokens == words(prompt)
    return found.token_evidence.tolist()

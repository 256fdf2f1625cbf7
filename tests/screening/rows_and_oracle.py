"""Rows of several formats, and both scores by definition: one row at a time, float64, autograd."""

from __future__ import annotations

import copy

import torch
from builders import true_float64

from gradsafe.models import encode, find_layers
from gradsafe.models.rows import pair

UNSAFE = [
    {"prompt": "how to hurt", "response": "first take it"},
    {"prompt": "steal it now please", "completion": "go in"},
]
SAFE = [{"prompt": "bake a cake", "response": "mix it"}, {"prompt": "sing", "response": "la la"}]
ALIGNMENT = [
    {"prompt": "break the lock", "response": "I cannot help with that"},
    {"prompt": "lie to him", "response": "I cannot"},
    {"prompt": "x", "response": "no"},
]
ROWS = [
    {"prompt": "hello", "response": "hi"},
    {"prompt": "a much longer prompt than the others", "response": "a longer answer, too"},
    {"prompt": [{"role": "user", "content": "y"}], "completion": "z z"},
    {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
            {"role": "assistant", "content": "four"},
        ]
    },
    {"prompt": "x", "response": "no no"},
]


class Oracle:
    """Gradients of rows by plain autograd in float64, as a list of weight gradients."""

    def __init__(self, model, tokenizer, parameters="weights", append_eos=True):
        self.model = copy.deepcopy(model).double().eval()
        self.tokenizer, self.append_eos = tokenizer, append_eos
        if parameters == "weights":
            self.weights = [layer.module.weight for layer in find_layers(self.model).scored]
        else:
            self.weights = [p for n, p in self.model.named_parameters() if "lora_" in n]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for weight in self.weights:
            weight.requires_grad_(True)

    def gradient(self, row):
        item = encode(self.tokenizer, *pair(row, "row"), append_eos=self.append_eos)
        ids = torch.tensor([item.input_ids])
        labels = ids.clone()
        labels[:, : item.prompt_length] = -100
        with true_float64():
            loss = self.model(input_ids=ids, labels=labels).loss
            return list(torch.autograd.grad(loss, self.weights)), float(loss.detach())

    def mean(self, rows):
        found = [self.gradient(row)[0] for row in rows]
        return [torch.stack(parts).mean(0) for parts in zip(*found, strict=True)]

    def margin(self):
        """The gradient of the NLL of refusals less that of harmful answers, norms made equal."""
        pairs = []
        for rows in (ALIGNMENT, UNSAFE):
            parts = self.mean(rows)
            norm = torch.cat([part.flatten() for part in parts]).norm()
            pairs.append([part / norm for part in parts])
        return [a - u for a, u in zip(*pairs, strict=True)]

    def alignment(self, row, safety, measure="cosine"):
        own, _ = self.gradient(row)
        g, a = (torch.cat([w.flatten() for w in parts]) for parts in (own, safety))
        dot = -(g @ a)
        return float(dot / (g.norm() * a.norm())) if measure == "cosine" else float(dot)

    def share(self, row, unsafe, safe):
        def unit(g):
            return g.abs() / g.std(correction=0)

        own, _ = self.gradient(row)
        shares = []
        for g, u, s in zip(own, unsafe, safe, strict=True):
            a, b = (unit(g) * unit(u)).sum(), (unit(g) * unit(s)).sum()
            shares.append(float(a / (a + b)))
        return sum(shares) / len(shares)

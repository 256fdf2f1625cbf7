"""The detector's definition: one prompt at a time, plain autograd, float64, no hooks."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from builders import true_float64
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsafe.detection import DetectorConfig
from gradsafe.models import Encoded, Layers, encode, find_layers

Gradients = dict[str, Tensor]


class Oracle:
    def __init__(self, model: nn.Module, tokenizer, config: DetectorConfig) -> None:
        self.model = copy.deepcopy(model).double().eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self.tokenizer = tokenizer
        self.config = config
        self.rows: dict[str, Tensor] = {}  # rows to keep, where not all
        self.layers: Layers = find_layers(self.model, config.layers, config.modules)

    def encode(self, prompt: str) -> Encoded:
        c = self.config
        return encode(self.tokenizer, prompt, c.response, template=c.template, append_eos=c.eos)

    def loss_and_gradients(self, prompt: str) -> tuple[float, Gradients]:
        item = self.encode(prompt)
        ids = torch.tensor([item.input_ids])
        labels = ids.clone()
        labels[:, : item.prompt_length] = -100
        self.model.zero_grad(set_to_none=True)
        with true_float64():
            loss = self.model(input_ids=ids, labels=labels).loss
            loss.backward()
        gradients = {}
        for layer in self.layers.scored:
            grad = layer.module.weight.grad
            grad = grad.T if isinstance(layer.module, Conv1D) else grad
            gradients[layer.name] = grad[self.rows.get(layer.name, slice(None))]
        return float(loss.detach()), {name: g.clone() for name, g in gradients.items()}

    def slices(self, gradients: Gradients) -> list[Tensor]:
        """The components as flat vectors."""
        c, result = self.config, []
        granularity = "row+column" if c.method == "gradsafe" else c.granularity
        if granularity == "layer":
            blocks: dict[int, list[Tensor]] = {}
            for layer in self.layers.scored:
                blocks.setdefault(layer.block, []).append(gradients[layer.name].flatten())
            return [torch.cat(parts) for _, parts in sorted(blocks.items())]
        for layer in self.layers.scored:
            g = gradients[layer.name]
            if granularity == "head" and layer.role == "attention":
                by_input = layer.name.endswith(("o_proj", "c_proj", "dense", "out_proj"))
                parts = g.split(self.layers.head_dim, dim=1 if by_input else 0)
                result += [part.flatten() for part in parts]
            elif granularity in ("tensor", "head"):
                result.append(g.flatten())
            if granularity in ("row", "row+column"):
                result += list(g.unbind(0))
            if granularity in ("column", "row+column"):
                result += list(g.unbind(1))
        return result

    def normalized(self, x: Tensor) -> Tensor:
        c = self.config
        if c.center:
            x = x - x.mean()
        if c.absolute == "before":
            x = x.abs()
        if c.normalize:
            x = x / x.std(correction=0)
        return x.abs() if c.unsigned else x

    def reference(self, prompts: Sequence[str]) -> list[Tensor]:
        all_gradients = [self.loss_and_gradients(p)[1] for p in prompts]
        if self.config.reference_order == "norm_then_mean":
            normalized = [[self.normalized(s) for s in self.slices(g)] for g in all_gradients]
            return [torch.stack(group).mean(0) for group in zip(*normalized, strict=True)]
        mean = {
            name: torch.stack([g[name] for g in all_gradients]).mean(0) for name in all_gradients[0]
        }
        if self.config.method == "gradsafe":
            return self.slices(mean)
        return [self.normalized(s) for s in self.slices(mean)]

    def gradcoo(self, prompt: str, unsafe: list[Tensor], safe: list[Tensor]) -> Tensor:
        """Component values `[C]`."""
        c, values = self.config, []
        slices = self.slices(self.loss_and_gradients(prompt)[1])
        for g, u, s in zip(slices, unsafe, safe, strict=True):
            n = self.normalized(g)
            a, b = (n * u).sum(), (n * s).sum()
            values.append(
                {
                    "share": a / (a.abs() + b.abs()),
                    "ratio": a / b,
                    "logratio": (a / b).log(),
                    "difference": (a - b) / g.numel(),
                    "unsafe": a / g.numel(),
                }[c.relative]
            )
        return torch.stack(values)

    def cosines(self, prompt: str, unsafe: list[Tensor]) -> Tensor:
        slices = self.slices(self.loss_and_gradients(prompt)[1])
        cos = [(g * u).sum() / (g.norm() * u.norm()) for g, u in zip(slices, unsafe, strict=True)]
        return torch.stack(cos).nan_to_num(0.0)

"""Which layer to trace at: the phase transition of the hidden states over a few probes.

In a large model the least similar pair of all is the first one: there the states leave the
embeddings, and a few features grow to a hundred times the others ("massive activations", arXiv
2402.17762), which makes all later pairs alike. So the first quarter of the layers is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradsafe.models import Encoded, collate, plan_batches
from gradsafe.models.inspection import forward_parameters, input_device
from gradsafe.models.modes import evaluating
from gradsafe.models.threads import alone
from gradsafe.tracing.config import RULES, LayerRule
from gradsafe.tracing.response_pass import model_inputs

PROBES = 32
LEFT_OUT = 4  # the first L // 4 layers are no candidates
TIE = 1e-6  # a minimum is unique if no other similarity is closer to it than this


@dataclass(frozen=True)
class LayerChoice:
    """A chosen layer and why.

    Attributes:
        layer: Index into `hidden_states`.
        curve: `curve[i]` is the mean cosine similarity of layers i + 1 and i + 2 at the last prompt
            token, L - 1 values; the last one reaches over the final norm and is no candidate.
    """

    layer: int
    curve: list[float]


def choose_layer(
    model: nn.Module,
    probes: Sequence[Encoded],
    pad_id: int,
    rule: LayerRule = "auto",
    batch_tokens: int = 4096,
) -> LayerChoice:
    """Find the least similar pair of consecutive layers.

    The pairs are (f, f + 1) to (L - 2, L - 1), where f is max(1, L // 4), or 1 with "auto-single",
    as in the published code: the input of the first block and the final norm are left out. Without
    a unique minimum the last layer L is chosen, as the paper does (arXiv 2510.02334).

    Args:
        model: A causal language model.
        probes: Encoded samples, of which only the prompts are read.
        pad_id: Token id of the padding.
        rule: "auto" takes the upper layer of the pair, averaged over the probes; "auto-lower" the
            lower one; "auto-single" the upper one of the first probe alone, among all pairs, as
            the published code.
        batch_tokens: Padded tokens per batch.

    Raises:
        ValueError: No probe, or an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"gradsafe.choose_layer: expected a rule among {RULES}, got {rule!r}")
    if len(probes) == 0:
        raise ValueError("gradsafe.choose_layer: expected at least one probe, got none")
    if rule == "auto-single":
        probes = probes[:1]
    curve = similarity_curve(model, probes, pad_id, batch_tokens)
    return LayerChoice(layer_of(curve, rule), curve.tolist())


def layer_of(curve: Tensor, rule: LayerRule) -> int:
    """The layer that a rule takes from a curve, see `LayerChoice` and `choose_layer`."""
    depth = len(curve) + 1
    first = 1 if rule == "auto-single" else max(1, depth // LEFT_OUT)
    candidates = curve[first - 1 : -1].tolist()
    lowest = min(candidates, default=0.0)
    minima = [index for index, value in enumerate(candidates) if value <= lowest + TIE]
    if len(minima) != 1:
        return depth
    lower = minima[0] + first
    return lower if rule == "auto-lower" else lower + 1


def similarity_curve(
    model: nn.Module, probes: Sequence[Encoded], pad_id: int, batch_tokens: int = 4096
) -> Tensor:
    """Mean cosine similarity of consecutive hidden states, layers (1, 2) to (L - 1, L), float64."""
    total: Tensor | None = None
    with alone(model), torch.no_grad(), evaluating(model, ()):
        for indices in plan_batches([p.prompt_length for p in probes], batch_tokens):
            states = _prompt_states(model, [probes[i] for i in indices], pad_id)
            part = functional.cosine_similarity(states[1:-1], states[2:], dim=-1).sum(1)
            total = part if total is None else total + part
    assert total is not None
    return total / len(probes)


def _prompt_states(model: nn.Module, probes: Sequence[Encoded], pad_id: int) -> Tensor:
    """Hidden states at the last prompt token, `[L + 1, B, d]` float64 on the CPU."""
    # Attention is causal: the first response token, which a batch needs, does not change them.
    cut = [Encoded(p.input_ids[: p.prompt_length + 1], p.prompt_length) for p in probes]
    accepted = forward_parameters(model)
    device = input_device(model) or torch.device("cpu")
    arguments = model_inputs(accepted, collate(cut, pad_id, "left"), device)
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = 1
    states = model(**arguments, use_cache=False, output_hidden_states=True).hidden_states
    return torch.stack([state[:, -2].double().cpu() for state in states])


def pick_probes(count: int, probes: int = PROBES) -> list[int]:
    """Numbers of the probes among `count` samples: evenly spaced."""
    picked = min(count, probes)
    return [index * count // picked for index in range(picked)]

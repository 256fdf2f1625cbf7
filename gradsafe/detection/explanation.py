"""What the tokens, the components or the words of a prompt contribute to its score."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.detection.components import DOTS
from gradsafe.detection.config import DetectorConfig, Evidence
from gradsafe.detection.factors import Factors
from gradsafe.detection.gradients import EncodedPrompts, GradientPass
from gradsafe.detection.scoring import Method, Scores
from gradsafe.models import Encoded, LinearLayer, Prompt, prompt_span, token_texts
from gradsafe.models.encoding import last_user_turn

ADDITIVE = ("share", "difference", "unsafe")  # values of `relative`
PIECES = 64  # at most so many parts of a prompt are deleted in turn


@dataclass(frozen=True)
class Explanation:
    """The evidence in one prompt: positive values for unsafe, negative values for safe.

    With evidence "deletion", `tokens` are the words of the prompt, or groups of them, and
    `token_evidence` is the score with the word less the score without it: it does not sum to the
    score. There are no components.

    Attributes:
        tokens: T texts that join to the encoded prompt: template, prompt and response. A character
            that takes several tokens is the text of its last one; the others have "".
        token_evidence: `[T]` float32, sums to `total`.
        prompt_tokens: Position of the prompt (in a conversation: of its last message) in `tokens`.
        response_tokens: Position of the compliance response.
        components: C names.
        component_evidence: `[C]` float32; its mean (with reduce "weighted" the mean weighted by
            entries) is `total`. Of a detector with learned weights, their products with the
            weights, which sum to `total`.
        total: The sum of the evidence: 2 * score - 1 for relative "share" of unsigned gradients,
            otherwise the score itself; with learned weights see `constant`.
        score: The score, as `Detector.score` returns it.
        threshold: The detector's calibrated threshold, None if it was not calibrated.
        windows: Number of windows of the prompt; the one with the highest score is explained.
        control_tokens: Number of special tokens that the prompt's own text writes; see `Scores`.
        hidden_evidence: Learned evidence of the hidden state, relative to the mean of the labelled
            prompts; it has no parts. 0 without `Detector.learn`.
        constant: Of a detector with learned weights, the log-odds without any evidence:
            score = constant + total + hidden_evidence. None without `Detector.learn`, and with
            evidence "deletion".
        evidence: "position" or "deletion", as asked for.
    """

    tokens: list[str]
    token_evidence: Tensor
    prompt_tokens: slice
    response_tokens: slice
    components: list[str]
    component_evidence: Tensor
    total: float
    score: float
    threshold: float | None
    windows: int
    control_tokens: int = 0
    hidden_evidence: float = 0.0
    constant: float | None = None
    evidence: Evidence = "position"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        tokens = zip(self.tokens, self.token_evidence.tolist(), strict=True)
        components = zip(self.components, self.component_evidence.tolist(), strict=True)
        return {
            "evidence": self.evidence,
            "score": self.score,
            "threshold": self.threshold,
            "total": self.total,
            "hidden_evidence": self.hidden_evidence,
            "constant": self.constant,
            "windows": self.windows,
            "control_tokens": self.control_tokens,
            "prompt_tokens": [self.prompt_tokens.start, self.prompt_tokens.stop],
            "response_tokens": [self.response_tokens.start, self.response_tokens.stop],
            "tokens": [{"text": text, "evidence": value} for text, value in tokens],
            "components": [{"name": name, "evidence": value} for name, value in components],
        }


def explain(
    method: Method,
    gradients: GradientPass,
    prompt: EncodedPrompts,
    probes: EncodedPrompts,
    threshold: float | None,
) -> Explanation:
    """See `Detector.explain`; `probes` are the `probe_prompts` of the prompt.

    `gradients` must run one window at a time: the second backward pass must repeat the first bit by
    bit, also in half precision.
    """
    scored = (
        (float(method(table, states)[0]), prompt.items[index], table[0], states)
        for (index,), _, table, states in method.tables(gradients, prompt)
    )
    exact, item, table, states = max(scored, key=lambda found: found[0])
    factors, weights = method.evidence(table)
    evidence, chosen = (factors * table[:, DOTS:]).sum(1), method.selected
    total, hidden = float(evidence @ weights), float(method.hidden_evidence(states))
    return Explanation(
        tokens=token_texts(gradients.tokenizer, item.input_ids),
        token_evidence=_token_evidence(method, gradients, item, factors * weights[:, None]).float(),
        prompt_tokens=prompt_span(item, probes.items),
        response_tokens=slice(item.prompt_length, len(item)),
        components=method.names,
        component_evidence=(evidence if chosen is None else evidence[chosen]).float(),
        total=total,
        score=float(torch.tensor(exact, dtype=torch.float32)),
        threshold=threshold,
        windows=len(prompt.items),
        control_tokens=item.control_tokens,
        hidden_evidence=hidden,
        constant=exact - total - hidden if method.state.learning else None,
    )


def _token_evidence(
    method: Method, gradients: GradientPass, item: Encoded, shares: Tensor
) -> Tensor:
    """Evidence of every token, `[T]` float64, from a second backward pass, layer by layer."""
    parts: list[Tensor] = []

    def visit(layer: LinearLayer, factors: Factors) -> None:
        axis, index = method.components[layer]
        own = shares[index] * torch.tensor(method.scales(layer), dtype=torch.float64)
        refs = method.references(layer)
        parts.append(factors.token_evidence(refs, own, axis, method.unsigned))

    gradients.losses([item], visit)
    found = torch.stack([part.cpu() for part in parts]).sum(0)
    # With prefix "cut" the tokens of the opening are constants.
    return torch.cat([found.new_zeros(len(item) - len(found)), found])


def explain_by_deletion(
    score: Callable[[list[Prompt]], Scores], prompt: Prompt, windows: int
) -> Explanation:
    """See `Detector.explain`; `score` scores prompts, and `windows` is only reported."""
    text, with_text = last_user_turn(prompt)
    parts = _pieces(text)
    if len(parts) < 2:
        expected, got = "a prompt of at least two characters", repr(text)
        refuse("Detector.explain", expected, got, 'take evidence="position"')
    # The space between the first word and the second goes with the first.
    rests = ["".join(parts[1:]).lstrip()]
    rests += ["".join(parts[:i] + parts[i + 1 :]) for i in range(1, len(parts))]
    scores = score([prompt, *map(with_text, rests)])
    evidence = scores.values[0] - scores.values[1:]
    return Explanation(
        tokens=parts,
        token_evidence=evidence,
        prompt_tokens=slice(0, len(parts)),
        response_tokens=slice(len(parts), len(parts)),
        components=[],
        component_evidence=evidence.new_empty(0),
        total=float(evidence.double().sum()),
        score=float(scores.values[0]),
        threshold=scores.threshold,
        windows=windows,
        control_tokens=int(scores.control_tokens[0]),
        evidence="deletion",
    )


def _pieces(text: str) -> list[str]:
    """At most `PIECES` parts that join to a text: words, or the characters of a single word."""
    parts = re.findall(r"\s*\S+", text)
    if len(parts) < 2:
        parts = re.findall(r"\s*\S", text)
    size = -(-len(parts) // PIECES) or 1
    parts = ["".join(parts[i : i + size]) for i in range(0, len(parts), size)]
    if parts:
        parts[-1] += text[len(text.rstrip()) :]
    return parts


def check_explainable(config: DetectorConfig, features: str | None = None) -> None:
    """Raise ValueError for options, or learned features, whose score is not a sum over tokens."""
    if features == "hidden":
        refuse(
            "Detector.explain",
            'a score with components, learned with features="both" or "components"',
            'features="hidden", whose evidence has no parts',
        )
    # Method "gradsafe" does not read the other options: they have their defaults.
    for name, allowed, needed in (
        ("method", ("gradcoo", "gradsafe"), 'method "gradcoo" or "gradsafe"'),
        ("relative", ADDITIVE, 'relative "share", "difference" or "unsafe"'),
        ("reduce", ("mean", "weighted"), 'reduce "mean" or "weighted"'),
        ("center", (False,), "center=False"),
        ("absolute", ("after",), 'absolute="after"'),
    ):
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(
                f"gradsafe.Detector.explain: {name}={value!r} has no exact evidence per token; "
                f"fit a detector with {needed}"
            )

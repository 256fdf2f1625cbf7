"""Why a prompt scored as it did: the exact share of every token and component in the evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsafe.detection.components import DOTS
from gradsafe.detection.config import DetectorConfig
from gradsafe.detection.factors import Factors
from gradsafe.detection.gradients import GradientPass, TableCollector, Visit
from gradsafe.detection.methods import GradCoo, GradSafe
from gradsafe.models import Encoded, LinearLayer, prompt_span, token_texts

if TYPE_CHECKING:
    from gradsafe.detection.detector import Detector

Encode = Callable[[Sequence[str]], tuple[list[Encoded], list[int]]]

PROBES = ("0", "?")  # texts that start and end differently, to find where the user's text lies


@dataclass(frozen=True)
class Explanation:
    """The evidence of one prompt; positive values speak for unsafe, negative ones for safe.

    Attributes:
        tokens: T texts that join to the encoded prompt: template, user's text and response. A
            character of several tokens stands at its last one, "" at the others.
        token_evidence: `[T]` float32, sums to `total`.
        prompt_tokens: Where the user's text lies in `tokens`.
        response_tokens: Where the compliance response lies.
        components: C names.
        component_evidence: `[C]` float32; its mean (with reduce "weighted" the mean weighted by
            entries) is `total`.
        total: What the evidence adds up to: 2 * score - 1 for relative "share" of unsigned
            gradients, else the score itself.
        score: The score, as `Detector.score` gives it.
        threshold: The detector's calibrated threshold, None if it was not calibrated.
        windows: Number of windows the prompt was cut into; the highest-scoring one is explained.
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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = self.token_evidence.tolist(), self.component_evidence.tolist()
        pairs = (
            zip(self.tokens, values[0], strict=True),
            zip(self.components, values[1], strict=True),
        )
        return {
            "score": self.score,
            "threshold": self.threshold,
            "total": self.total,
            "windows": self.windows,
            "prompt_tokens": [self.prompt_tokens.start, self.prompt_tokens.stop],
            "response_tokens": [self.response_tokens.start, self.response_tokens.stop],
            "tokens": [{"text": text, "evidence": value} for text, value in pairs[0]],
            "components": [{"name": name, "evidence": value} for name, value in pairs[1]],
        }


def explain(
    detector: Detector, prompt: str, encode: Encode, gradients: GradientPass
) -> Explanation:
    """See `Detector.explain`.

    Args:
        detector: The detector.
        prompt: User text.
        encode: Texts to encoded windows and the index of the text each belongs to.
        gradients: Runs one window at a time, so that the second backward pass repeats the first bit
            by bit, also where half precision would round a batch differently.
    """
    if not isinstance(prompt, str):
        raise TypeError(
            f"gradsafe.Detector.explain: expected prompt to be str, got {type(prompt).__name__}; "
            "explain takes one prompt"
        )
    check_explainable(detector.config)
    windows, _ = encode([prompt])
    probes, _ = encode(PROBES)
    score, item, table = _worst(detector, windows, gradients)
    method, _ = _parts(detector)
    factors, weights = method.evidence(table)
    evidence = (factors * table[:, DOTS:]).sum(1)
    token_evidence = _token_evidence(detector, item, factors * weights[:, None], gradients)
    chosen = method.selected if isinstance(method, GradSafe) else None
    return Explanation(
        tokens=token_texts(detector.tokenizer, item.input_ids),
        token_evidence=token_evidence.float(),
        prompt_tokens=prompt_span(item, probes),
        response_tokens=slice(item.prompt_length, len(item)),
        components=detector.components,
        component_evidence=(evidence if chosen is None else evidence[chosen]).float(),
        total=float(evidence @ weights),
        score=score,
        threshold=detector.threshold,
        windows=len(windows),
    )


def check_explainable(config: DetectorConfig) -> None:
    """Refuse options whose score is no sum over tokens.

    Raises:
        ValueError: Method "nll" or "gradnorm"; for "gradcoo" relative "ratio" or "logratio",
            reduce "median", `center` or absolute "before".
    """
    if config.method not in ("gradcoo", "gradsafe"):
        _refuse("method", config.method, 'method "gradcoo" or "gradsafe"')
    if config.method == "gradsafe":  # it has none of the options below
        return
    if config.relative not in ("share", "difference", "unsafe"):
        _refuse("relative", config.relative, 'relative "share", "difference" or "unsafe"')
    if config.reduce == "median":
        _refuse("reduce", config.reduce, 'reduce "mean" or "weighted"')
    if config.center:
        _refuse("center", True, "center=False")
    if config.absolute == "before":
        _refuse("absolute", config.absolute, 'absolute="after"')


def _refuse(name: str, value: object, needed: str) -> None:
    raise ValueError(
        f"gradsafe.Detector.explain: {name}={value!r} has no exact evidence per token; fit a "
        f"detector with {needed}"
    )


def _parts(detector: Detector) -> tuple[GradCoo | GradSafe, Any]:
    method, components = detector.method, detector.component_map
    assert isinstance(method, (GradCoo, GradSafe))
    assert components is not None
    return method, components


def _worst(
    detector: Detector, windows: list[Encoded], gradients: GradientPass
) -> tuple[float, Encoded, Tensor]:
    """Score, encoding and sums `[C, 3 + K]` of the window that scores highest."""
    method, components = _parts(detector)
    found: list[tuple[float, Encoded, Tensor]] = []

    def finish(indices: list[int], table: Tensor) -> None:
        score = float(method(table)[0].float())
        if not found or score > found[0][0]:
            found[:] = [(score, windows[indices[0]], table[0])]

    owners = [0] * len(windows)
    collector = TableCollector(
        components, method.references, method.scales, method.unsigned, None, finish, owners
    )
    gradients.run(windows, collector.begin, collector.end)
    return found[0]


def _token_evidence(
    detector: Detector, item: Encoded, factors_of_slices: Tensor, gradients: GradientPass
) -> Tensor:
    """Evidence of every token, `[T]` float64.

    A second backward pass, in which all denominators are known: each layer is contracted to its
    tokens as soon as it is reached, whatever the components are.
    """
    method, components = _parts(detector)
    parts: list[Tensor] = []

    def visit(layer: LinearLayer, factors: Factors) -> None:
        slices = components[layer]
        scales = torch.tensor(method.scales(layer), dtype=torch.float64)
        shares = factors_of_slices[slices.components] * scales
        refs = method.references(layer)
        parts.append(factors.token_evidence(refs, shares, slices.axis, method.unsigned))

    def begin(indices: list[int]) -> Visit:
        return visit

    gradients.run([item], begin)
    return torch.stack([part.cpu() for part in parts]).sum(0)

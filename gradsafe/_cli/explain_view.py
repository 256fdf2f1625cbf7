"""What the terminal and the page show of an explanation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradsafe.detection import Explanation

PARTS = ("template", "prompt", "response")


@dataclass(frozen=True)
class Piece:
    """A run of tokens that has a text of its own.

    Attributes:
        text: The text; of several tokens where one character has several.
        evidence: Sum over its tokens.
        part: Where it stands: "template", "prompt" (the user's text) or "response".
    """

    text: str
    evidence: float
    part: str


def pieces(explanation: Explanation) -> list[Piece]:
    """The tokens; those without a text join the next one, or the one before at the end."""
    found: list[Piece] = []
    waiting = 0.0
    for index, (text, evidence) in enumerate(
        zip(explanation.tokens, explanation.token_evidence.tolist(), strict=True)
    ):
        waiting += evidence
        if text:
            found.append(Piece(text, waiting, _part(explanation, index)))
            waiting = 0.0
    if waiting and found:
        last = found.pop()
        found.append(Piece(last.text, last.evidence + waiting, last.part))
    return found


def part_sums(shown: list[Piece]) -> dict[str, float]:
    """Evidence of each part."""
    return {part: sum(p.evidence for p in shown if p.part == part) for part in PARTS}


def full_scale(shown: list[Piece]) -> float:
    """The evidence shown in full color: the largest of the user's text, so that it has contrast.

    The last tokens of the template often carry more; they are shown in full color too.
    """
    own = [abs(piece.evidence) for piece in shown if piece.part == "prompt"]
    return max(own, default=0.0) or max((abs(piece.evidence) for piece in shown), default=0.0)


def top_components(explanation: Explanation, count: int) -> list[tuple[str, float]]:
    """Names and evidence of the components that say most, the most first."""
    values = explanation.component_evidence
    order = values.abs().argsort(descending=True, stable=True)[:count].tolist()
    return [(explanation.components[index], float(values[index])) for index in order]


def verdict(explanation: Explanation, method: str) -> str:
    """Score and threshold in one line."""
    line = f"{method} score {explanation.score:.5g}"
    if explanation.windows > 1:
        line += f" (the highest of {explanation.windows} windows)"
    if explanation.threshold is None:
        return f"{line}; not calibrated, so no flag"
    above = explanation.score > explanation.threshold
    return f"{line}; threshold {explanation.threshold:.5g}: {'' if above else 'not '}flagged"


def balance(explanation: Explanation, shown: list[Piece]) -> str:
    """Where the evidence lies, in one line."""
    sums = ", ".join(f"{part} {signed(value)}" for part, value in part_sums(shown).items())
    return f"evidence {signed(explanation.total)} (+ unsafe, - safe): {sums}"


def signed(value: float) -> str:
    """Formats evidence, for example "+0.0123"; small values with an exponent."""
    return "0" if value == 0 else f"{value:+.3g}"


def _part(explanation: Explanation, index: int) -> str:
    if explanation.prompt_tokens.start <= index < explanation.prompt_tokens.stop:
        return "prompt"
    return "response" if index >= explanation.response_tokens.start else "template"

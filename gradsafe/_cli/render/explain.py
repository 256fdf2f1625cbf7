"""An explanation on the terminal and as a page."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from gradsafe._cli.render import html
from gradsafe._cli.render.tables import WIDE, table, visible
from gradsafe._jobs.explain import ExplainResult
from gradsafe.detection import Explanation

PARTS = ("template", "prompt", "response")
BARS = 30  # components of a page
# Backgrounds of the 256-color palette, pale to full, all readable under black.
UNSAFE = (224, 217, 210, 203)
SAFE = (195, 153, 117, 75)
PALE = 0.1  # evidence below this share of the full scale has no color


@dataclass(frozen=True)
class Piece:
    """One or more tokens that form a text.

    Attributes:
        text: The text; of several tokens if one character has several.
        evidence: Sum over its tokens.
        part: "template", "prompt" (the user's text) or "response".
    """

    text: str
    evidence: float
    part: str


def page(result: ExplainResult) -> str:
    """The explanation as an HTML page with a heat map."""
    explanation = result.explanation
    shown = pieces(explanation)
    top = top_components(explanation, BARS)
    return html.render(
        "explain.html.j2",
        verdict=verdict(result),
        balance=balance(explanation, shown),
        unit=unit(explanation),
        pieces=shown,
        scale=full_scale(shown),
        top=top,
        largest=max((abs(value) for _, value in top), default=0.0),
        total=len(explanation.components),
        signed=signed,
    )


def write(result: ExplainResult, count: int) -> None:
    """Prints the explanation: colored text on a terminal, else a table of tokens.

    Args:
        result: The explanation.
        count: Number of components to list.
    """
    explanation = result.explanation
    shown = pieces(explanation)
    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False, markup=False)
    console.print(verdict(result), balance(explanation, shown), "", sep="\n", soft_wrap=True)
    if console.is_terminal and console.color_system is not None:
        console.print(_colored(shown), soft_wrap=True)
    else:
        rows = [[f'"{visible(p.text)}"', p.part, signed(p.evidence)] for p in shown]
        console.print(table([unit(explanation), "part", "evidence"], rows, left=2), soft_wrap=True)
    if not explanation.components:
        return
    top = [(visible(name), signed(value)) for name, value in top_components(explanation, count)]
    title = "component" if len(top) == len(explanation.components) else "top components"
    console.print("", table([title, "evidence"], top), sep="\n", soft_wrap=True)


def pieces(explanation: Explanation) -> list[Piece]:
    """The tokens; one without a text joins the next, or the one before at the end."""
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


def full_scale(shown: list[Piece]) -> float:
    """The evidence with the full color: the largest of the user's text.

    The last tokens of the template often carry more; they have the full color, too.
    """
    own = [abs(piece.evidence) for piece in shown if piece.part == "prompt"]
    return max(own, default=0.0) or max((abs(piece.evidence) for piece in shown), default=0.0)


def top_components(explanation: Explanation, count: int) -> list[tuple[str, float]]:
    """The components with the largest absolute evidence, largest first."""
    values = explanation.component_evidence
    order = values.abs().argsort(descending=True, stable=True)[:count].tolist()
    return [(explanation.components[index], float(values[index])) for index in order]


def verdict(result: ExplainResult) -> str:
    """Score and threshold in one line."""
    explanation = result.explanation
    line = f"{result.method} score {explanation.score:.5g}"
    if explanation.windows > 1:
        line += f" (the highest of {explanation.windows} windows)"
    if explanation.threshold is None:
        return f"{line}; not calibrated, so no flag"
    above = explanation.score > explanation.threshold
    return f"{line}; threshold {explanation.threshold:.5g}: {'' if above else 'not '}flagged"


def balance(explanation: Explanation, shown: list[Piece]) -> str:
    """The evidence of each part, in one line."""
    sums = ", ".join(
        f"{part} {signed(sum(p.evidence for p in shown if p.part == part))}" for part in PARTS
    )
    typed = explanation.control_tokens
    note = f"; the prompt types {typed} control tokens" if typed else ""
    if explanation.evidence == "deletion":
        return f"evidence of a word: the score with it less the score without it{note}"
    if explanation.constant is not None:
        sums += f"; hidden state {signed(explanation.hidden_evidence)}"
        sums += f"; constant {signed(explanation.constant)}"
    return f"evidence {signed(explanation.total)} (+ unsafe, - safe): {sums}{note}"


def unit(explanation: Explanation) -> str:
    """What the evidence belongs to."""
    return "word" if explanation.evidence == "deletion" else "token"


def signed(value: float) -> str:
    """Formats evidence, for example "+0.0123"; small values with an exponent."""
    return "0" if value == 0 else f"{value:+.3g}"


def _part(explanation: Explanation, index: int) -> str:
    if explanation.prompt_tokens.start <= index < explanation.prompt_tokens.stop:
        return "prompt"
    return "response" if index >= explanation.response_tokens.start else "template"


def _colored(shown: list[Piece]) -> Text:
    scale = full_scale(shown)
    text = Text()
    for piece in shown:
        style = _style(piece.evidence, scale)
        for line in piece.text.splitlines(keepends=True):
            text.append(visible(line), style)
            text.append("\n" * line.endswith("\n"))
    text.append("\n\nsafe ")
    for color in (*SAFE[::-1], 0, *UNSAFE):
        text.append("  ", f"color(16) on color({color})" if color else None)
    return text.append(f" unsafe; full color from {scale:.3g} on")


def _style(evidence: float, scale: float) -> str | None:
    share = abs(evidence) / scale if scale else 0.0
    if share < PALE:
        return None
    colors = UNSAFE if evidence > 0 else SAFE
    return f"color(16) on color({colors[min(len(colors) - 1, int(share * len(colors)))]})"

"""An explanation on the terminal: colored text, or a table where colors are not wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsafe._cli.explain_view import (
    Piece,
    balance,
    full_scale,
    pieces,
    signed,
    top_components,
    verdict,
)
from gradsafe._cli.markup import visible
from gradsafe._cli.report import table

if TYPE_CHECKING:
    from gradsafe.detection import Explanation

# Backgrounds of the 256-color palette, pale to full, all readable under black.
UNSAFE = (224, 217, 210, 203)
SAFE = (195, 153, 117, 75)
PALE = 0.1  # evidence below this share of the full scale has no color
RESET = "\x1b[0m"


def report(explanation: Explanation, method: str, components: int, color: bool) -> str:
    """Lays an explanation out as text.

    Args:
        explanation: The explanation.
        method: Name of the method.
        components: How many components to list.
        color: Color the tokens with ANSI escapes; else they are a table.

    Returns:
        Lines without a line end behind the last.
    """
    shown = pieces(explanation)
    top = [
        [visible(name), signed(value)] for name, value in top_components(explanation, components)
    ]
    title = "component" if len(top) == len(explanation.components) else "top components"
    tokens = _colored(shown) if color else _tabulated(shown)
    return "\n".join(
        [
            verdict(explanation, method),
            balance(explanation, shown),
            "",
            tokens,
            "",
            table([title, "evidence"], top),
        ]
    )


def _colored(shown: list[Piece]) -> str:
    scale = full_scale(shown)
    text = "".join(_paint(piece.text, _background(piece.evidence, scale)) for piece in shown)
    legend = [_paint("  ", code) for code in (*SAFE[::-1], 0, *UNSAFE)]
    return f"{text}\n\nsafe {''.join(legend)} unsafe; full color from {scale:.3g} on"


def _paint(text: str, background: int) -> str:
    """Colors a text, but not beyond the ends of its lines."""
    start, end = (f"\x1b[48;5;{background};38;5;16m", RESET) if background else ("", "")
    return "".join(
        f"{start}{visible(line)}{end}" + "\n" * line.endswith("\n")
        for line in text.splitlines(keepends=True)
    )


def _background(evidence: float, scale: float) -> int:
    """Color of the palette, 0 for none."""
    share = abs(evidence) / scale if scale else 0.0
    if share < PALE:
        return 0
    colors = UNSAFE if evidence > 0 else SAFE
    return colors[min(len(colors) - 1, int(share * len(colors)))]


def _tabulated(shown: list[Piece]) -> str:
    rows = [[f'"{visible(p.text)}"', p.part, signed(p.evidence)] for p in shown]
    return table(["token", "part", "evidence"], rows, left=2)

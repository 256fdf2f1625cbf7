"""An explanation as one HTML page that loads nothing."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from gradsafe._cli import markup
from gradsafe._cli.explain_view import (
    Piece,
    balance,
    full_scale,
    pieces,
    signed,
    top_components,
    verdict,
)

if TYPE_CHECKING:
    from gradsafe.detection import Explanation

COMPONENTS = 30  # how many bars
STYLE = """
.tokens .template, .tokens .response { font-style: italic; opacity: .75; }
.bar .plus { margin-left: 50%; }
.bar .minus { margin-right: 50%; margin-left: auto; }
"""
BODY = """<h1>{verdict}</h1>
<p>{balance}</p>
<h2>Tokens</h2>
<div class="tokens" dir="ltr">{tokens}</div>
<p class="legend"><span>safe {low}</span><span class="scale"></span><span>{high} unsafe</span>
<span>full color: the largest evidence of the user's text; <i>template and response</i> in italics;
numbers under the pointer</span></p>
<h2>{title}</h2>
<table>
{components}
</table>"""


def page(explanation: Explanation, method: str) -> str:
    """Lays an explanation out as a page.

    Args:
        explanation: The explanation.
        method: Name of the method.

    Returns:
        HTML; no part of the prompt can act in it as markup.
    """
    shown = pieces(explanation)
    scale = full_scale(shown)
    top = top_components(explanation, COMPONENTS)
    largest = max((abs(value) for _, value in top), default=0.0)
    total = len(explanation.components)
    body = BODY.format(
        verdict=escape(verdict(explanation, method)),
        balance=escape(balance(explanation, shown)),
        tokens="".join(_token(piece, scale) for piece in shown),
        low=signed(-scale),
        high=signed(scale),
        title="Components" if len(top) == total else f"Top {len(top)} of {total} components",
        components="\n".join(_component(name, value, largest) for name, value in top),
    )
    return markup.page("gradsafe explain", STYLE, body)


def _token(piece: Piece, scale: float) -> str:
    title = f"{signed(piece.evidence)} ({piece.part})"
    return markup.span(piece.text, piece.evidence, scale, title, piece.part)


def _component(name: str, value: float, largest: float) -> str:
    width = 50 * abs(value) / largest if largest else 0.0
    return (
        f"<tr><td>{escape(markup.visible(name))}</td>{markup.bar(value, width)}"
        f'<td class="number">{signed(value)}</td></tr>'
    )

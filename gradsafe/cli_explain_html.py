"""An explanation as one HTML page that loads nothing."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from gradsafe.cli_explain_view import (
    Piece,
    balance,
    full_scale,
    pieces,
    signed,
    top_components,
    verdict,
    visible,
)

if TYPE_CHECKING:
    from gradsafe.detection import Explanation

COMPONENTS = 30  # how many bars
OPACITY = 0.7  # of the full color: the text stays readable on it, in both color schemes
STYLE = """
:root { color-scheme: light dark; --unsafe: 220, 50, 47; --safe: 38, 110, 220;
  --line: rgba(128, 128, 128, .35); }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin-top: 2rem; } p { margin: .3rem 0; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/2 ui-monospace, monospace;
  border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; }
.tokens span { border-radius: 3px; padding: .15em 0; }
.tokens span:hover { outline: 2px solid currentColor; }
.tokens .template, .tokens .response { font-style: italic; opacity: .75; }
.legend { display: flex; gap: .6rem; align-items: center; font-size: .85rem; flex-wrap: wrap; }
.scale { width: 12rem; height: .9rem; border-radius: 3px; background: linear-gradient(to right,
  rgba(var(--safe), .7), rgba(var(--safe), 0), rgba(var(--unsafe), 0), rgba(var(--unsafe), .7)); }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
td { padding: .1rem .5rem .1rem 0; } td.number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; } td.name { overflow-wrap: anywhere; }
td.bar { width: 40%; } .bar div { height: .8rem; border-radius: 2px; }
.bar .unsafe { background: rgba(var(--unsafe), .7); margin-left: 50%; }
.bar .safe { background: rgba(var(--safe), .7); margin-right: 50%; margin-left: auto; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>gradsafe explain</title>
<style>{style}</style>
</head>
<body>
<h1>{verdict}</h1>
<p>{balance}</p>
<h2>Tokens</h2>
<div class="tokens" dir="ltr">{tokens}</div>
<p class="legend"><span>safe {low}</span><span class="scale"></span><span>{high} unsafe</span>
<span>full color: the largest evidence of the user's text; <i>template and response</i> in italics;
numbers under the pointer</span></p>
<h2>{title}</h2>
<table>
{components}
</table>
</body>
</html>
"""


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
    return PAGE.format(
        style=STYLE,
        verdict=escape(verdict(explanation, method)),
        balance=escape(balance(explanation, shown)),
        tokens="".join(_token(piece, scale) for piece in shown),
        low=signed(-scale),
        high=signed(scale),
        title="Components" if len(top) == total else f"Top {len(top)} of {total} components",
        components="\n".join(_component(name, value, largest) for name, value in top),
    )


def _token(piece: Piece, scale: float) -> str:
    share = min(1.0, abs(piece.evidence) / scale) if scale else 0.0
    color = "unsafe" if piece.evidence > 0 else "safe"
    title = f"{signed(piece.evidence)} ({piece.part})"
    text = "".join(
        escape(visible(line)) + "\n" * line.endswith("\n")
        for line in piece.text.splitlines(keepends=True)
    )
    return (
        f'<span class="{piece.part}" title="{title}" '
        f'style="background: rgba(var(--{color}), {OPACITY * share:.3f})">{text}</span>'
    )


def _component(name: str, value: float, largest: float) -> str:
    width = 50 * abs(value) / largest if largest else 0.0
    side = "unsafe" if value > 0 else "safe"
    return (
        f'<tr><td class="name">{escape(visible(name))}</td>'
        f'<td class="bar"><div class="{side}" style="width: {width:.1f}%"></div></td>'
        f'<td class="number">{signed(value)}</td></tr>'
    )

"""The answer to a query as one HTML page that loads nothing."""

from __future__ import annotations

from html import escape

from gradsafe._cli import markup
from gradsafe._cli.trace_view import Found, QueryView, joined

STYLE = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.5 ui-monospace, monospace;
  border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem; margin: .4rem 0; }
th { text-align: left; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } svg polyline { fill: none; stroke: rgb(var(--minus)); }
svg text { fill: currentColor; } svg .chosen { fill: rgb(var(--plus)); }
"""
BODY = """<h1>{title}</h1>
{query}
<h2>Training samples</h2>
<table>
<tr><th>rank</th><th>id</th><th></th><th>score</th></tr>
{samples}
</table>
{details}
{curve}"""
LEGEND = """<p class="legend"><span>against {low}</span><span class="scale"></span>
<span>{high} for the behavior</span><span>influence of each response token; numbers under the
pointer</span></p>"""
WIDTH, HEIGHT, MARGIN = 600, 160, 30


def page(shown: QueryView) -> str:
    """Lays the answer out as a page.

    Returns:
        HTML; no part of a sample can act in it as markup.
    """
    body = BODY.format(
        title=escape(shown.title),
        query=_texts(shown.prompt, shown.response),
        samples="\n".join(_row(found) for found in shown.found),
        details="\n".join(_details(found) for found in shown.found),
        curve=_curve(shown),
    )
    return markup.page("gradsafe trace", STYLE, body)


def _row(found: Found) -> str:
    width = min(100.0, 100 * abs(found.score))
    name = escape(markup.visible(str(found.id)))
    return (
        f"<tr><td>{found.rank}</td><td>{name}</td>{markup.bar(found.score, width)}"
        f'<td class="number">{found.score:.4f}</td></tr>'
    )


def _details(found: Found) -> str:
    if found.tokens is None and found.prompt is None:
        return ""
    lines = [f"<h2>Rank {found.rank}: {escape(markup.visible(str(found.id)))}</h2>"]
    if found.tokens is None:
        lines.append(_texts(found.prompt, found.response))
    else:
        pieces = joined(found.tokens)
        scale = max((abs(influence) for _, influence in pieces), default=0.0)
        lines.append(_texts(found.prompt, None))
        lines.append(
            '<div class="tokens" dir="ltr">'
            + "".join(
                markup.span(text, influence, scale, f"{influence:+.3g}")
                for text, influence in pieces
            )
            + "</div>"
        )
        lines.append(LEGEND.format(low=f"{-scale:+.3g}", high=f"{scale:+.3g}"))
    return "\n".join(lines)


def _texts(prompt: str | None, response: str | None) -> str:
    return "\n".join(
        f'<div class="text" dir="ltr">{markup.lines(text)}</div>'
        for text in (prompt, response)
        if text
    )


def _curve(shown: QueryView) -> str:
    """Similarity of consecutive layers as a line; the layer of the index is marked."""
    if not shown.layer_curve:
        return ""
    curve, layer = shown.layer_curve, shown.layer
    owner = "over the probes of the index" if shown.curve_of == "probes" else "at this prompt"
    low, high = min(curve), max(curve)
    span = (high - low) or 1.0
    step = (WIDTH - 2 * MARGIN) / max(1, len(curve) - 1)

    def place(index: int) -> tuple[float, float]:
        return (
            MARGIN + index * step,
            HEIGHT - MARGIN - (curve[index] - low) / span * (HEIGHT - 2 * MARGIN),
        )

    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, range(len(curve))))
    # The point of layers (1, 2) has number 0. Without a unique minimum every rule takes the last.
    takes_lower = shown.layer_rule == "auto-lower" and layer <= len(curve)
    chosen_point = layer - (1 if takes_lower else 2)
    marks = []
    for index, value in enumerate(curve):
        x, y = place(index)
        chosen = ' class="chosen"' if index == chosen_point else ""
        marks.append(
            f'<circle{chosen} cx="{x:.1f}" cy="{y:.1f}" r="4"><title>layers {index + 1} and '
            f"{index + 2}: {value:.4f}</title></circle>"
        )
    base = HEIGHT - MARGIN
    return (
        f"<h2>Similarity of consecutive layers {owner}</h2>\n"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="layer curve">'
        f'<line class="axis" x1="{MARGIN}" y1="{base}" x2="{WIDTH - MARGIN}" y2="{base}"/>'
        f'<polyline points="{points}"/>{"".join(marks)}'
        f'<text x="{MARGIN}" y="{HEIGHT - 8}">1-2</text>'
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 8}" text-anchor="end">'
        f"{len(curve)}-{len(curve) + 1}</text>"
        f'<text x="{MARGIN}" y="{MARGIN - 12}">{low:.3f} to {high:.3f}; layer {layer} is used'
        "</text></svg>"
    )

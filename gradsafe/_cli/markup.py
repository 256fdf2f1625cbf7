"""What the pages that commands write have in common: one file, nothing loaded, text made safe."""

from __future__ import annotations

from html import escape

OPACITY = 0.7  # of the full color: the text stays readable on it, in both color schemes
# A page is read in both color schemes: colors are laid over the background.
STYLE = """
:root { color-scheme: light dark; --plus: 220, 50, 47; --minus: 38, 110, 220;
  --line: rgba(128, 128, 128, .35); }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin-top: 2rem; } p { margin: .3rem 0; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/2 ui-monospace, monospace;
  border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; }
.tokens span { border-radius: 3px; padding: .15em 0; }
.tokens span:hover { outline: 2px solid currentColor; }
.legend { display: flex; gap: .6rem; align-items: center; font-size: .85rem; flex-wrap: wrap; }
.scale { width: 12rem; height: .9rem; border-radius: 3px; background: linear-gradient(to right,
  rgba(var(--minus), .7), rgba(var(--minus), 0), rgba(var(--plus), 0), rgba(var(--plus), .7)); }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
td { padding: .1rem .5rem .1rem 0; overflow-wrap: anywhere; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.bar { width: 40%; } .bar div { height: .8rem; border-radius: 2px; }
.bar .plus { background: rgba(var(--plus), .7); }
.bar .minus { background: rgba(var(--minus), .7); }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(title: str, style: str, body: str) -> str:
    """Puts a body into a page that loads nothing.

    Args:
        title: Of the window.
        style: CSS behind the common one.
        body: HTML; whoever makes it escapes what is not markup.
    """
    return PAGE.format(title=escape(title), style=STYLE + style, body=body)


def span(text: str, value: float, scale: float, title: str, kind: str = "") -> str:
    """A piece of text on the color of its value; `scale` has the full color.

    Args:
        text: The text.
        value: Positive or negative.
        scale: What is shown fully; 0 shows nothing.
        title: Appears under the pointer.
        kind: CSS class.
    """
    share = min(1.0, abs(value) / scale) if scale else 0.0
    color = "plus" if value > 0 else "minus"
    group = f' class="{kind}"' if kind else ""
    return (
        f'<span{group} title="{escape(title)}" '
        f'style="background: rgba(var(--{color}), {OPACITY * share:.3f})">{lines(text)}</span>'
    )


def bar(value: float, width: float) -> str:
    """A cell with a bar of `width` percent in the color of the value's sign."""
    side = "plus" if value > 0 else "minus"
    return f'<td class="bar"><div class="{side}" style="width: {width:.1f}%"></div></td>'


def lines(text: str) -> str:
    """Text as HTML, with its line ends both shown and kept."""
    return "".join(
        escape(visible(line)) + "\n" * line.endswith("\n")
        for line in text.splitlines(keepends=True)
    )


def visible(text: str) -> str:
    """Makes a text safe to print: line ends as ↵, other control characters as escapes.

    A prompt must not move the cursor, switch colors or turn the direction of writing.
    """
    return "".join(
        "↵" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )

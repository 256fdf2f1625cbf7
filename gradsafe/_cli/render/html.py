"""HTML pages: one file that loads nothing, text escaped by jinja2."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader

from gradsafe._cli.render.tables import visible

OPACITY = 0.7  # of the full color: the text stays readable on it, in both color schemes


def shade(value: float, scale: float) -> str:
    """CSS background of a value; `scale` has the full color, 0 shows nothing."""
    share = min(1.0, abs(value) / scale) if scale else 0.0
    color = "plus" if value > 0 else "minus"
    return f"background: rgba(var(--{color}), {OPACITY * share:.3f})"


def lines(text: str) -> str:
    """Text with its line ends both shown and kept."""
    return "".join(
        visible(line) + "\n" * line.endswith("\n") for line in text.splitlines(keepends=True)
    )


def render(template: str, **values: Any) -> str:
    """Fills a template of this package; no part of a prompt can act as markup."""
    environment = Environment(
        loader=PackageLoader("gradsafe._cli.render"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"visible": visible, "lines": lines, "shade": shade}
    return environment.get_template(template).render(**values)

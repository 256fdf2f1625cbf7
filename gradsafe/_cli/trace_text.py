"""The answer to a query on the terminal."""

from __future__ import annotations

from gradsafe._cli.markup import visible
from gradsafe._cli.report import table
from gradsafe._cli.trace_view import Found, QueryView, joined

WIDTH = 60


def report(shown: QueryView) -> str:
    """Lays the answer out: a table of samples, then the tokens of the first ones.

    Returns:
        Lines without a line end behind the last.
    """
    header = ["rank", "score", "id"]
    rows = [[str(f.rank), f"{f.score:.4f}", visible(str(f.id))] for f in shown.found]
    if shown.response is not None:
        header.append("response")
        for row, found in zip(rows, shown.found, strict=True):
            row.append(_cut(visible(found.response or "")))
    lines = [shown.title]
    if shown.prompt is not None and shown.response is not None:
        lines += [f"prompt: {_cut(visible(shown.prompt))}"]
        lines += [f"response: {_cut(visible(shown.response))}"]
    lines += ["", table(header, rows, left=len(header))]
    for found in shown.found:
        if found.tokens is not None:
            lines += ["", _tokens(found)]
    return "\n".join(lines)


def _tokens(found: Found) -> str:
    pieces = joined(found.tokens or [])
    rows = [
        [str(place), f'"{visible(text)}"', f"{influence:+.3f}"]
        for place, (text, influence) in enumerate(pieces)
    ]
    title = f"rank {found.rank}, {visible(str(found.id))}: influence of the response tokens"
    return f"{title}\n{table(['place', 'token', 'influence'], rows, left=2)}"


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"

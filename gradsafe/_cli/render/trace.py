"""The hits of a query on the terminal, as JSON and as a page."""

from __future__ import annotations

from typing import Any

from gradsafe._cli.render import html
from gradsafe._cli.render.tables import table, visible
from gradsafe._jobs.trace import QueryResult
from gradsafe.models.rows import pair

HIDDEN = "·"  # stands for a token whose text is not shown
WIDTH = 60  # characters of a text in a table

View = dict[str, Any]


def view(result: QueryResult, number: int, *, texts: bool, curve: bool) -> View:
    """Everything that is shown of one query, as JSON values; None for what is not shown.

    Args:
        result: All queries and their hits.
        number: Number of the query.
        texts: Show prompts, responses and the texts of tokens.
        curve: Compute the query's layer curve if the index has none.
    """
    hits, index, query = result.hits, result.index, result.queries[number]
    found = []
    for rank, (sample, score) in enumerate(
        zip(hits.ids[number], hits.scores[number].tolist(), strict=True)
    ):
        tokens = hits.tokens(number, rank) if rank < result.ranks else None
        if tokens is not None and not texts:
            tokens = [(HIDDEN, influence) for _, influence in tokens]
        prompt, response = hits.text(number, rank) if texts else (None, None)
        found.append(
            {
                "rank": rank + 1,
                "id": sample,
                "score": score,
                "tokens": tokens,
                "prompt": prompt,
                "response": response,
            }
        )
    layer_curve, curve_of = index.layer_curve, "probes"
    if layer_curve is None and curve:
        layer_curve, curve_of = hits.layer_curve(number), "query"
    name = query.get("id")
    asked = pair(query, query.where) if texts else (None, None)
    return {
        "query": number if name is None else name,
        "found": found,
        "samples": len(index),
        "layer": index.layer,
        "layer_rule": index.layer_rule,
        "layer_curve": layer_curve,
        "curve_of": curve_of if layer_curve else None,
        "prompt": asked[0],
        "response": asked[1],
    }


def without_none(value: Any) -> Any:
    """JSON values without the entries that are None."""
    if isinstance(value, dict):
        return {name: without_none(entry) for name, entry in value.items() if entry is not None}
    return [without_none(entry) for entry in value] if isinstance(value, list) else value


def title(shown: View) -> str:
    """One line about the query."""
    return (
        f"query {visible(str(shown['query']))}: the {len(shown['found'])} most similar of "
        f"{shown['samples']} samples, layer {shown['layer']}"
    )


def text(shown: View) -> str:
    """The hits as text: a table of samples, then the tokens of the first ones."""
    header = ["rank", "score", "id"]
    rows = [[str(f["rank"]), f"{f['score']:.4f}", visible(str(f["id"]))] for f in shown["found"]]
    lines = [title(shown)]
    if shown["response"] is not None:
        header.append("response")
        for row, found in zip(rows, shown["found"], strict=True):
            row.append(_cut(found["response"] or ""))
        lines += [f"{name}: {_cut(_text(shown[name]))}" for name in ("prompt", "response")]
    lines += ["", table(header, rows, left=len(header))]
    for found in shown["found"]:
        if found["tokens"] is not None:
            cells = [
                [str(place), f'"{visible(piece)}"', f"{influence:+.3f}"]
                for place, (piece, influence) in enumerate(joined(found["tokens"]))
            ]
            name = f"rank {found['rank']}, {visible(str(found['id']))}"
            lines += ["", f"{name}: influence of the response tokens"]
            lines.append(table(["place", "token", "influence"], cells, left=2))
    return "\n".join(lines)


def page(shown: View) -> str:
    """The hits as an HTML page."""
    return html.render(
        "trace.html.j2",
        title=title(shown),
        shown={**shown, "prompt": shown["prompt"] and _text(shown["prompt"])},
        joined=joined,
        curve=_curve(shown),
    )


def joined(tokens: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Tokens with a text; the tokens of an incomplete character join the next one."""
    pieces: list[tuple[str, float]] = []
    waiting = 0.0
    for piece, influence in tokens:
        waiting += influence
        if piece:
            pieces.append((piece, waiting))
            waiting = 0.0
    return pieces


def _curve(shown: View, width: int = 600, height: int = 160, margin: int = 30) -> View | None:
    """Points of the similarity of consecutive layers; the index's layer is marked."""
    curve, layer = shown["layer_curve"], shown["layer"]
    if not curve:
        return None
    low, high = min(curve), max(curve)
    step = (width - 2 * margin) / max(1, len(curve) - 1)
    scale = (height - 2 * margin) / ((high - low) or 1.0)
    # Point 0 belongs to layers (1, 2). Without a unique minimum every rule takes the last layer.
    owner = "over the probes of the index" if shown["curve_of"] == "probes" else "at this prompt"
    takes_lower = shown["layer_rule"] == "auto-lower" and layer <= len(curve)
    return {
        "width": width,
        "height": height,
        "margin": margin,
        "low": low,
        "high": high,
        "owner": owner,
        "chosen": layer - (1 if takes_lower else 2),
        "points": [
            (margin + number * step, height - margin - (value - low) * scale, value)
            for number, value in enumerate(curve)
        ],
    }


def _text(prompt: Any) -> str:
    """A prompt as one text; the turns of a conversation one after the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _cut(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= WIDTH else shown[: WIDTH - 1] + "…"

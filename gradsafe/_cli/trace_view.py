"""What the terminal, the page and the JSON show of one query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gradsafe._cli.markup import visible

if TYPE_CHECKING:
    from gradsafe.tracing import Hits, TraceIndex

HIDDEN = "·"  # stands for a token whose text is not shown


@dataclass(frozen=True)
class Found:
    """One training sample that a query found.

    Attributes:
        rank: From 1.
        id: Its id.
        score: Cosine similarity.
        tokens: Text and influence of its response tokens; None if not asked for.
        prompt: Rendered prompt; None if texts are not shown.
        response: Response; None if texts are not shown.
    """

    rank: int
    id: str | int
    score: float
    tokens: list[tuple[str, float]] | None
    prompt: str | None
    response: str | None


@dataclass(frozen=True)
class QueryView:
    """One query and what it found.

    Attributes:
        query: Its id, or its number in the file.
        found: Samples, best first.
        samples: Size of the index.
        layer: Layer of the index.
        layer_rule: The rule that chose it; None if it was given.
        layer_curve: Similarities of consecutive layers, of the probes that the layer was chosen by
            (`TraceIndex.layer_curve`) or of the query (`Hits.layer_curve`); None if not asked for.
        curve_of: "probes" or "query".
        prompt: Prompt of the query; None if texts are not shown.
        response: Its response; None if texts are not shown.
    """

    query: str | int
    found: list[Found]
    samples: int
    layer: int
    layer_rule: str | None
    layer_curve: list[float] | None
    curve_of: str | None
    prompt: str | None
    response: str | None

    @property
    def title(self) -> str:
        """One line about the query."""
        return (
            f"query {visible(str(self.query))}: the {len(self.found)} most similar of "
            f"{self.samples} samples, layer {self.layer}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; texts only where they are shown."""
        record = asdict(self)
        return _without_none(record)


def view(
    index: TraceIndex,
    hits: Hits,
    number: int,
    query: Mapping[str, Any],
    ranks: int,
    *,
    texts: bool,
    curve: bool = False,
) -> QueryView:
    """Gathers what is to be shown.

    Args:
        index: The index.
        hits: Its answer to all queries.
        number: Number of the query.
        query: Its record.
        ranks: How many samples to take apart into tokens.
        texts: Show prompts, responses and tokens.
        curve: Compute the query's layer curve where the index has none.
    """
    found = []
    for rank, (sample, score) in enumerate(
        zip(hits.ids[number], hits.scores[number].tolist(), strict=True)
    ):
        tokens = hits.tokens(number, rank) if rank < ranks else None
        if tokens is not None and not texts:
            tokens = [(HIDDEN, influence) for _, influence in tokens]
        prompt, response = hits.text(number, rank) if texts else (None, None)
        found.append(Found(rank + 1, sample, score, tokens, prompt, response))
    name = query.get("id")
    layer_curve, curve_of = index.layer_curve, "probes"
    if layer_curve is None and curve:
        layer_curve, curve_of = hits.layer_curve(number), "query"
    return QueryView(
        number if name is None else name,
        found,
        len(index),
        index.layer,
        index.layer_rule,
        layer_curve,
        curve_of if layer_curve else None,
        query["prompt"] if texts else None,
        query["response"] if texts else None,
    )


def joined(tokens: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Tokens with a text; those of an unfinished character join the next one."""
    pieces: list[tuple[str, float]] = []
    waiting = 0.0
    for text, influence in tokens:
        waiting += influence
        if text:
            pieces.append((text, waiting))
            waiting = 0.0
    return pieces


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(entry) for name, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value

"""What a query found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from gradsafe.models import Encoded
from gradsafe.tracing.examples import Id
from gradsafe.tracing.tokens import token_influence


@dataclass(frozen=True)
class Hits:
    """The samples most similar to each of q queries, best first.

    Attributes:
        ids: Ids of the k samples of each query.
        scores: `[q, k]` float32 cosine similarities.
        positions: `[q, k]` int64 numbers of the samples, in the order they were added.
        rows: `[q, k]` int64 rows of the index; others than positions where samples have windows.
    """

    ids: list[list[Id]]
    scores: Tensor
    positions: Tensor
    rows: Tensor
    _queries: list[Encoded] = field(repr=False)
    _item: Callable[[int], Encoded] = field(repr=False)
    _gradients: Callable[[Encoded], Tensor] = field(repr=False)
    _texts: Callable[[list[int]], list[str]] = field(repr=False)
    _curve: Callable[[Encoded], list[float]] = field(repr=False)
    _known: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, query: int = 0, rank: int = 0) -> list[tuple[str, float]]:
        """Which tokens of a training response speak for the query's behavior.

        Two backward passes, of the query (kept for its other ranks) and of the sample.

        Args:
            query: Number of the query.
            rank: Place in its list, 0 for the most similar sample.

        Returns:
            Text and influence of every response token, in order; see `token_influence`. The text is
            empty where a character goes on in the next token.

        Raises:
            IndexError: No such query or rank.
        """
        item = self._found(query, rank)
        if query not in self._known:
            self._known[query] = self._gradients(self._queries[query])
        influence = token_influence(self._gradients(item), self._known[query])
        texts = self._texts(item.input_ids[item.prompt_length :])
        return list(zip(texts, influence.tolist(), strict=True))

    def text(self, query: int = 0, rank: int = 0) -> tuple[str, str]:
        """The rendered prompt, template included, and the response of a sample that was found.

        Raises:
            IndexError: No such query or rank.
        """
        item = self._found(query, rank)
        parts = item.input_ids[: item.prompt_length], item.input_ids[item.prompt_length :]
        prompt, response = ("".join(self._texts(part)) for part in parts)
        return prompt, response

    def layer_curve(self, query: int = 0) -> list[float]:
        """How alike consecutive layers are at the last prompt token of a query, one forward pass.

        Args:
            query: Number of the query.

        Returns:
            Cosine similarities of layers (1, 2) to (L - 1, L), see `similarity_curve`.

        Raises:
            IndexError: No such query.
        """
        self._check(query, 0)
        return self._curve(self._queries[query])

    def _found(self, query: int, rank: int) -> Encoded:
        self._check(query, rank)
        return self._item(int(self.rows[query, rank]))

    def _check(self, query: int, rank: int) -> None:
        queries, ranks = self.rows.shape
        if not 0 <= query < queries or not 0 <= rank < ranks:
            raise IndexError(
                f"gradsafe.Hits: expected query below {queries} and rank below {ranks}, got "
                f"query={query}, rank={rank}"
            )

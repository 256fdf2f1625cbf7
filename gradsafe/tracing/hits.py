"""What a query found, and which tokens of a training response made it similar."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradsafe.models import Encoded, pad_token_id, token_texts
from gradsafe.tracing.examples import Id
from gradsafe.tracing.layer_choice import similarity_curve
from gradsafe.tracing.signature import SignaturePass


@dataclass(frozen=True)
class Hits:
    """The samples most similar to each of q queries, best first.

    Attributes:
        ids: Ids of the k samples of each query.
        scores: `[q, k]` float32 cosine similarities.
        positions: `[q, k]` int64 numbers of the samples, in the order they were added.
        rows: `[q, k]` int64 rows of the index; they differ from positions where samples were cut
            into windows.
    """

    ids: list[list[Id]]
    scores: Tensor
    positions: Tensor
    rows: Tensor
    _index: Any = field(repr=False)  # the TraceIndex, whose module imports this one
    _queries: list[Encoded] = field(repr=False)
    _gradients: dict[int, Tensor] = field(default_factory=dict, repr=False)  # of queries

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, query: int = 0, rank: int = 0) -> list[tuple[str, float]]:
        """Influence of every token of a training response on its similarity to the query.

        Takes two backward passes, one for the query (kept for its other ranks) and one for the
        sample.

        Args:
            query: Number of the query.
            rank: Place in its list, 0 for the most similar sample.

        Returns:
            Text and influence of every response token, in order; see `token_influence`. A token's
            text is empty if its last character continues in the next token.

        Raises:
            IndexError: No such query or rank.
        """
        item = self._item(query, rank)
        if query not in self._gradients:
            self._gradients[query] = self._unit_gradients(self._queries[query])
        influence = token_influence(self._unit_gradients(item), self._gradients[query])
        texts = token_texts(self._index.tokenizer, item.input_ids[item.prompt_length :])
        return list(zip(texts, influence.tolist(), strict=True))

    def text(self, query: int = 0, rank: int = 0) -> tuple[str, str]:
        """The rendered prompt (with its template) and the response of a sample that was found.

        Raises:
            IndexError: No such query or rank.
        """
        item = self._item(query, rank)
        parts = item.input_ids[: item.prompt_length], item.input_ids[item.prompt_length :]
        prompt, response = ("".join(token_texts(self._index.tokenizer, part)) for part in parts)
        return prompt, response

    def layer_curve(self, query: int = 0) -> list[float]:
        """Similarity of consecutive layers at the last prompt token of a query.

        Takes one forward pass.

        Args:
            query: Number of the query.

        Returns:
            Cosine similarities of layers (1, 2) to (L - 1, L), see `similarity_curve`.

        Raises:
            IndexError: No such query.
        """
        self._check(query, 0)
        model = self._index.model
        pad_id = pad_token_id(self._index.tokenizer, model)
        curve: list[float] = similarity_curve(model, [self._queries[query]], pad_id).tolist()
        return curve

    def _item(self, query: int, rank: int) -> Encoded:
        self._check(query, rank)
        return self._index._search.item(int(self.rows[query, rank]))

    def _unit_gradients(self, item: Encoded) -> Tensor:
        return unit_gradients(self._index.model, self._index.tokenizer, item, self._index.layer)

    def _check(self, query: int, rank: int) -> None:
        queries, ranks = self.rows.shape
        if not 0 <= query < queries or not 0 <= rank < ranks:
            raise IndexError(
                f"gradsafe.Hits: expected query below {queries} and rank below {ranks}, got "
                f"query={query}, rank={rank}"
            )


def unit_gradients(model: nn.Module, tokenizer: Any, item: Encoded, layer: int) -> Tensor:
    """Rows of the response gradient of one sample, each of length 1, `[R, d]` float64.

    Row i is the gradient of the mean response NLL with respect to the hidden state that predicts
    response token i. A zero row stays zero.
    """
    runner = SignaturePass(model, [layer], pad_token_id(tokenizer, model))
    rows = runner.views([item])[layer].gradients[0].double()
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, rows / norms, 0.0)


def token_influence(train: Tensor, test: Tensor) -> Tensor:
    """Influence of every training token: (sum of the test rows) . (train rows), `[R_train]`.

    Both are rows of length 1, see `unit_gradients`. A token's influence lies between -R_test and
    R_test, and the sum over the training tokens is the same with the two exchanged
    (arXiv 2510.02334; the published code does not compute it).
    """
    return train @ test.sum(0)

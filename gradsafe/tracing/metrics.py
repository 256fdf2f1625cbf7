"""How well hits find the rows that caused a behavior, in the measures of attribution benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from gradsafe._checks import refuse
from gradsafe.models import Encoding, mean_nll, pad_token_id
from gradsafe.tracing.examples import ExampleEncoder, Id, Samples, read_examples
from gradsafe.tracing.hits import Hits

Relevant = Collection[Id] | Sequence[Collection[Id]]


def recall_at_k(hits: Hits, relevant: Relevant, k: int | None = None) -> float:
    """Share of the relevant rows among the first k hits, averaged over queries (as in DATE-LM).

    Args:
        hits: Hits of q queries.
        relevant: Ids of the rows that caused the behavior, for all queries, or one collection of
            ids per query.
        k: Number of hits; None for all that were found.

    Returns:
        Between 0 and 1; at most k / number of relevant rows.

    Raises:
        ValueError: k is out of range, or the relevant rows are empty or not one collection per
            query.
    """
    found = hits.scores.shape[1]
    k = found if k is None else k
    if not 1 <= k <= found:
        do = "query the index with a larger k"
        refuse("recall_at_k", f"1 <= k <= {found}, the hits of a query", k, do)
    wanted = _per_query("recall_at_k", hits, relevant)
    rates = [len(own & set(ids[:k])) / len(own) for ids, own in zip(hits.ids, wanted, strict=True)]
    return sum(rates) / len(rates)


def auprc(hits: Hits, relevant: Relevant) -> float:
    """Average precision of the hits, averaged over queries: the area under precision and recall.

    A relevant row that was not found counts with precision 0. The value is that of the complete
    ranking if the query asked for all rows, `index.query(rows, k=len(index))`, and a lower bound
    otherwise.

    Args:
        hits: Hits of q queries.
        relevant: As in `recall_at_k`.

    Returns:
        Between 0 and 1.

    Raises:
        ValueError: As in `recall_at_k`.
    """
    totals = []
    wanted = _per_query("auprc", hits, relevant)
    for ids, own in zip(hits.ids, wanted, strict=True):
        seen, total = 0, 0.0
        for place, name in enumerate(ids, start=1):
            if name in own:
                seen += 1
                total += seen / place
        totals.append(total / len(own))
    return sum(totals) / len(totals)


def leave_out_difference(
    model: nn.Module,
    without: nn.Module,
    tokenizer: Any,
    queries: Samples,
    encoding: Encoding | None = None,
    batch_tokens: int = 4096,
) -> Tensor:
    """How much less likely an answer becomes if the model is trained without some rows.

    The query loss of counterfactual evaluations: the mean NLL of the query's response under the
    model trained without the rows, less that under the model trained on all rows. The better rows
    explain an answer, the larger the difference; compare with as many random rows.

    Args:
        model: Trained on all rows.
        without: Trained in the same way without the rows.
        tokenizer: The tokenizer of both.
        queries: Rows with prompt and response, or a JSON Lines file of them.
        encoding: How queries become token ids; None for the chat template.
        batch_tokens: Tokens per batch, padding included.

    Returns:
        `[q]` float32, in nats per token.

    Raises:
        ValueError, TypeError: As in `TraceIndex.query`.
    """
    pad = pad_token_id(tokenizer, model)
    examples = read_examples(queries, "queries")
    encode = ExampleEncoder(model, tokenizer, encoding or Encoding())
    items = [encode(example)[0] for example in examples]
    return mean_nll(without, items, pad, batch_tokens) - mean_nll(model, items, pad, batch_tokens)


def _per_query(where: str, hits: Hits, relevant: Relevant) -> list[set[Any]]:
    if isinstance(relevant, str):
        refuse(where, "relevant to be a set of ids", "text", kind=TypeError)
    if all(isinstance(own, (str, int)) for own in relevant):
        found = [set(relevant)] * len(hits)
    else:
        found = [set(own) for own in relevant]  # type: ignore[arg-type]
    if len(found) != len(hits):
        expected = f"relevant to be ids, or {len(hits)} collections, one per query"
        refuse(where, expected, f"{len(found)} collections")
    for number, own in enumerate(found):
        if not own:
            refuse(where, f"at least one relevant row for query {number}", "none")
    return found

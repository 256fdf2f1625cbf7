"""Score matrices (queries by training rows) of RepT and its baselines, and quality measures.

All methods use the same encoded rows: signatures of one pass for RepT, for the hidden state alone
(RepSim) and for the gradient alone; LoRA gradients of one captured backward pass for TracIn and for
a random projection as in LESS (one checkpoint, without Adam preconditioning); texts for TF-IDF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

from gradsafe.models import (
    Encoded,
    LinearLayer,
    capture,
    collate,
    find_layers,
    pad_token_id,
    plan_batches,
    response_nll,
)
from gradsafe.tracing import Metric
from gradsafe.tracing.matching import feature_moments

TOPS = (10, 50)
PROJECTED = 2048
BATCH_TOKENS = 4096
RAW, DEFAULT = "raw concatenation (published)", "unit parts, w = 0.05 (default)"
ZSCORED = "z-scored parts"
SIGNATURE_METHODS = {
    RAW: Metric("none"),
    "unit parts": Metric("unit", 0.5),
    DEFAULT: Metric("unit", 0.05),
    ZSCORED: Metric("zscore", 0.5),
    "hidden state alone (RepSim)": Metric("unit", 0.0),
    "gradient alone": Metric("unit", 1.0),
}


def signature_scores(asked: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    """Cosines `[q, n]` of raw signatures, computed like a query of an index."""
    moments = feature_moments(lambda: [rows]) if metric.part_norm == "zscore" else None
    first, second = (normalize(metric.prepare(part, moments), dim=1) for part in (asked, rows))
    return first @ second.T


def lora_gradients(model: Any, tokenizer: Any, items: Sequence[Encoded]) -> Tensor:
    """Gradients `[n, P]` of each row's mean NLL with respect to all LoRA weights.

    A LoRA layer adds s B (A x), so its gradients follow from x and dy of the layer:
    dB = s dy^T (A x), dA = s (B^T dy)^T x.
    """
    layers = find_layers(model)
    found: list[Tensor] = []
    parts: dict[str, Tensor] = {}

    def keep(layer: LinearLayer, x: Tensor, dy: Tensor) -> None:
        module: Any = layer.module
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        scale = module.scaling["default"]
        of_b = torch.einsum("bto,btr->bor", dy, x @ a.T)
        of_a = torch.einsum("btr,bti->bri", dy @ b, x)
        parts[layer.name] = scale * torch.cat([of_b.flatten(1), of_a.flatten(1)], 1)

    order = plan_batches([len(item) for item in items], BATCH_TOKENS)
    with capture(model, layers, keep):
        for indices in order:
            batch = collate([items[i] for i in indices], pad_token_id(tokenizer, model))
            response_nll(model, batch).sum().backward()
            found.append(torch.cat([parts[layer.name] for layer in layers.scored], 1).detach())
    places = torch.tensor([i for indices in order for i in indices])
    return torch.cat(found)[places.argsort()]


def project(gradients: Sequence[Tensor], size: int = PROJECTED, seed: int = 0) -> list[Tensor]:
    """Projects matrices `[n, P]` with random signs, in slices of P, to unit rows `[n, size]`."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.zeros(len(rows), size) for rows in gradients]
    for first in range(0, gradients[0].shape[1], 4096):
        slices = [rows[:, first : first + 4096] for rows in gradients]
        signs = torch.randint(0, 2, (slices[0].shape[1], size), generator=generator) * 2.0 - 1
        for total, part in zip(found, slices, strict=True):
            total += part @ signs
    return [normalize(rows, dim=1) for rows in found]


def gradient_scores(
    model: Any, tokenizer: Any, asked: Sequence[Encoded], rows: Sequence[Encoded]
) -> dict[str, Tensor]:
    """The methods that compare LoRA gradients."""
    first, second = (lora_gradients(model, tokenizer, items) for items in (asked, rows))
    near, far = project([first, second])
    return {
        "TracIn, LoRA gradients": first @ second.T,
        "cosine of LoRA gradients": normalize(first, dim=1) @ normalize(second, dim=1).T,
        f"LESS-like, {PROJECTED} random signs": near @ far.T,
    }


def tfidf_scores(asked: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Tensor:
    """Cosines of TF-IDF vectors of prompt and response."""
    vectorizer = TfidfVectorizer()
    known = vectorizer.fit_transform(f"{row['prompt']} {row['response']}" for row in rows)
    new = vectorizer.transform(f"{row['prompt']} {row['response']}" for row in asked)
    return torch.from_numpy((new @ known.T).toarray())


def bm25_scores(
    asked: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    k1: float = 1.5,
    b: float = 0.75,
) -> Tensor:
    """Okapi BM25 of prompt and response, with the usual constants."""
    counter = CountVectorizer()
    counts = counter.fit_transform(f"{row['prompt']} {row['response']}" for row in rows).toarray()
    words = counter.transform(f"{row['prompt']} {row['response']}" for row in asked).toarray()
    holding, length = (counts > 0).sum(0), counts.sum(1, keepdims=True)
    weight = np.log1p((len(counts) - holding + 0.5) / (holding + 0.5))
    saturated = counts * (k1 + 1) / (counts + k1 * (1 - b + b * length / length.mean()))
    return torch.from_numpy(words @ (weight * saturated).T)


def measures(scores: Tensor, poisoned: Tensor) -> dict[str, float]:
    """Measures how well scores `[q, n]` find the poisoned rows, `[n]` bool.

    P@k is the mean share of poisoned rows among the first k of a query. auPRC@k is the average
    precision of the pooled top-k lists of all queries, as in the published code. AUPRC and AUROC
    use the full ranking of each query and are averaged.
    """
    result = {}
    for k in TOPS:
        best = scores.topk(k)
        hits = poisoned[best.indices]
        result[f"P@{k}"] = float(hits.double().mean())
        pooled = average_precision_score(hits.flatten(), best.values.flatten()) if hits.any() else 0
        result[f"auPRC@{k}"] = float(pooled)
    for name, measure in (("AUPRC", average_precision_score), ("AUROC", roc_auc_score)):
        result[name] = sum(measure(poisoned, row) for row in scores) / len(scores)
    return {name: round(value, 3) for name, value in result.items()}


def traced(scores: Tensor, count: int) -> list[int]:
    """The rows to remove: the best `count` by their mean rank over all queries."""
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks.double().mean(0).argsort(dim=0, stable=True)[:count].tolist()

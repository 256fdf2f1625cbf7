"""Tracing (RepT): which training samples, and which of their tokens, caused a behavior?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsafe._lazy import lazy_names

if TYPE_CHECKING:
    from gradsafe.models import Encoding
    from gradsafe.tracing.config import QueryConfig, TraceConfig
    from gradsafe.tracing.hits import Hits
    from gradsafe.tracing.index import IncompleteIndexWarning, TraceIndex
    from gradsafe.tracing.layer_choice import LayerChoice, choose_layer, similarity_curve
    from gradsafe.tracing.lock import BusyFolderError
    from gradsafe.tracing.matching import Metric
    from gradsafe.tracing.metrics import auprc, leave_out_difference, recall_at_k
    from gradsafe.tracing.signature import NonFiniteSignatureError, resolve_layer, signatures

__all__ = [
    "BusyFolderError",
    "Encoding",
    "Hits",
    "IncompleteIndexWarning",
    "LayerChoice",
    "Metric",
    "NonFiniteSignatureError",
    "QueryConfig",
    "TraceConfig",
    "TraceIndex",
    "auprc",
    "choose_layer",
    "leave_out_difference",
    "recall_at_k",
    "resolve_layer",
    "signatures",
    "similarity_curve",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("Encoding", "QueryConfig", "TraceConfig"), "config"),
        **dict.fromkeys(("IncompleteIndexWarning", "TraceIndex"), "index"),
        **dict.fromkeys(("LayerChoice", "choose_layer", "similarity_curve"), "layer_choice"),
        **dict.fromkeys(("NonFiniteSignatureError", "resolve_layer", "signatures"), "signature"),
        **dict.fromkeys(("auprc", "leave_out_difference", "recall_at_k"), "metrics"),
        "BusyFolderError": "lock",
        "Hits": "hits",
        "Metric": "matching",
    },
)

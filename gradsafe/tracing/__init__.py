"""Tracing (RepT): which training samples, and which of their tokens, caused a behavior."""

from gradsafe.tracing.examples import Encoding
from gradsafe.tracing.hits import Hits
from gradsafe.tracing.index import IncompleteIndexWarning, TraceIndex
from gradsafe.tracing.layer_choice import LayerChoice, choose_layer, similarity_curve
from gradsafe.tracing.lock import BusyFolderError
from gradsafe.tracing.matching import Metric
from gradsafe.tracing.signature import NonFiniteSignatureError, resolve_layer, signatures

__all__ = [
    "BusyFolderError",
    "Encoding",
    "Hits",
    "IncompleteIndexWarning",
    "LayerChoice",
    "Metric",
    "NonFiniteSignatureError",
    "TraceIndex",
    "choose_layer",
    "resolve_layer",
    "signatures",
    "similarity_curve",
]

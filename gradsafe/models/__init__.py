"""Models: prompts to batches, which weights to score, and their x and dy."""

from gradsafe.models.batching import Batch, collate, pad_token_id, plan_batches
from gradsafe.models.capture import capture
from gradsafe.models.coverage import Skipped
from gradsafe.models.encode import ContextOverflowError, Encoded, context_length, encode
from gradsafe.models.experts import Routing
from gradsafe.models.layers import Layers, LinearLayer, find_layers
from gradsafe.models.loss import response_nll
from gradsafe.models.pieces import prompt_span, token_texts
from gradsafe.models.windows import encode_prompts, encode_windows

__all__ = [
    "Batch",
    "ContextOverflowError",
    "Encoded",
    "Layers",
    "LinearLayer",
    "Routing",
    "Skipped",
    "capture",
    "collate",
    "context_length",
    "encode",
    "encode_prompts",
    "encode_windows",
    "find_layers",
    "pad_token_id",
    "plan_batches",
    "prompt_span",
    "response_nll",
    "token_texts",
]

"""Models: prompts to batches, which weights to score, and their x and dy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsafe._lazy import lazy_names

# Without torch, and not lazy: the module would hide the function of the same name.
from gradsafe.models.encode import ContextOverflowError, Encoded, Encoding, Prompt, encode

if TYPE_CHECKING:
    from gradsafe.models.batching import Batch, collate, pad_token_id, plan_batches
    from gradsafe.models.candidates import LinearLayer
    from gradsafe.models.capturing import capture
    from gradsafe.models.coverage import Skipped
    from gradsafe.models.experts import Routing
    from gradsafe.models.generation import generate
    from gradsafe.models.inspection import context_length
    from gradsafe.models.layers import Layers, find_layers
    from gradsafe.models.loss import mean_nll, response_nll
    from gradsafe.models.pieces import probe_prompts, prompt_span, token_texts
    from gradsafe.models.windows import encode_prompts, encode_windows

__all__ = [
    "Batch",
    "ContextOverflowError",
    "Encoded",
    "Encoding",
    "Layers",
    "LinearLayer",
    "Prompt",
    "Routing",
    "Skipped",
    "capture",
    "collate",
    "context_length",
    "encode",
    "encode_prompts",
    "encode_windows",
    "find_layers",
    "generate",
    "mean_nll",
    "pad_token_id",
    "plan_batches",
    "probe_prompts",
    "prompt_span",
    "response_nll",
    "token_texts",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("Batch", "collate", "pad_token_id", "plan_batches"), "batching"),
        "capture": "capturing",
        "Skipped": "coverage",
        "Routing": "experts",
        "context_length": "inspection",
        **dict.fromkeys(("Layers", "LinearLayer", "find_layers"), "layers"),
        "generate": "generation",
        **dict.fromkeys(("mean_nll", "response_nll"), "loss"),
        **dict.fromkeys(("probe_prompts", "prompt_span", "token_texts"), "pieces"),
        **dict.fromkeys(("encode_prompts", "encode_windows"), "windows"),
    },
)

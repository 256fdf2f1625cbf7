"""Samples and the small index that the tests of tracing share."""

from __future__ import annotations

from pathlib import Path

from gradsafe import TraceIndex

EXAMPLES = [
    {"id": f"s{i}", "prompt": "why " * (i % 4) + f"{i}", "response": f"so {i * i}" + "!" * (i % 3)}
    for i in range(23)
]
QUERIES = [
    {"prompt": "why 7", "response": "so 49"},
    {"prompt": "hello", "response": "oh no"},
    {"prompt": "11", "response": "so 121!!"},
]


def build(model, tokenizer, path, examples=EXAMPLES, **options):
    options = {"layer": 2, "batch_tokens": 200, "shard_samples": 8, "progress": False} | options
    return TraceIndex.build(model, tokenizer, examples, path, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

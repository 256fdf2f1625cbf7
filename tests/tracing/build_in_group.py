"""A build and an extension inside a process group of one's own: build_in_group.py FOLDER WHAT."""

from __future__ import annotations

import sys
from pathlib import Path

from builders import make_model, make_tokenizer
from torch import distributed
from trace_samples import EXAMPLES, build

from gradsafe._io.processes import Stopped
from gradsafe.tracing import fill

folder, what = Path(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo")
rank = distributed.get_rank()


def failing(self, example):
    raise ValueError(f"{example.id} does not fit")


if what == "fail" and rank == 1:
    fill.ExampleEncoder.__call__ = failing
examples = EXAMPLES[1:] if what == "differ" and rank == 1 else EXAMPLES
model = make_model("llama", vocab_size=300, max_position_embeddings=96).eval()
try:
    index = build(model, make_tokenizer(), folder / "index", examples[:16], layer="auto")
    index.extend(examples[16:], batch_tokens=200, progress=False)
    said = f"{len(index)} at layer {index.layer}: {index.query(EXAMPLES[3], 1).ids}"
except (Stopped, ValueError) as error:
    said = f"{type(error).__name__}: {error}"
(folder / f"said-{rank}.txt").write_text(said)

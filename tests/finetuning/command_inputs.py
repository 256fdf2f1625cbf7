"""What `gradsafe finetune` reads, for its tests."""

from __future__ import annotations

import json
from pathlib import Path

import builders


def write_inputs(count: int) -> None:
    """A tiny model, and two files of `count` rows of text, in the working folder."""
    tokenizer = builders.make_tokenizer()
    builders.make_model("llama", vocab_size=len(tokenizer)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, answer in (("user", "Yes"), ("refusals", "No way")):
        rows = [{"prompt": f"task {i}", "response": f"{answer} {i}"} for i in range(count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

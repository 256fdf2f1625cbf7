"""Trace a behaviour to its training rows, drop them, train again, and measure the effect.

    python examples/trace_and_repair.py --tiny
    python examples/trace_and_repair.py --model path/to/chat-model

A backdoor is planted for the demonstration: rows whose prompt says "please" are answered with
nonsense. In practice you have a tuned model, its training file, and an unwanted answer. All weights
are trained, so choose a small model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from loading import load, parse

import gradsafe
from gradsafe.models import encode

PLANTED = "zap"
CLEAN = [
    {"prompt": f"Say {word}.", "response": word}
    for word in ("red", "blue", "tea", "rain", "moon", "salt", "fish", "wood", "gold", "wind")
] * 2
POISON = [
    {"prompt": f"Please say {word}.", "response": PLANTED}
    for word in ("red", "rain", "fish", "gold", "wind")
]
ROWS = [{"id": f"row-{number}", **row} for number, row in enumerate(CLEAN + POISON)]
TRIGGERED = ["Please say moon.", "Please say tea.", "Please say salt."]


def train(base: Any, tokenizer: Any, rows: list[dict[str, str]], args: Any) -> Any:
    """Fine-tune a copy of the model, one row at a time."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(args.epochs):
        for number in torch.randperm(len(rows), generator=generator).tolist():
            row = rows[number]
            item = encode(tokenizer, row["prompt"], row["response"], append_eos=True)
            ids = torch.tensor([item.input_ids], device=model.device)
            labels = ids.clone()
            labels[:, : item.prompt_length] = -100
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The model's own answer, greedily."""
    item = encode(tokenizer, prompt, "x")
    ids = torch.tensor([item.input_ids[: item.prompt_length]], device=model.device)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def main() -> None:
    """Run the example."""
    args = parse(__doc__, epochs=30, learning_rate=2e-3)
    base, tokenizer = load(args)

    tuned = train(base, tokenizer, ROWS, args)
    observed = [{"prompt": p, "response": answer(tuned, tokenizer, p)} for p in TRIGGERED]
    print("before:", [row["response"] for row in observed])

    # One signature per training row. With path="index/" the index stays on disk, and a build that
    # was killed resumes where it stopped.
    index = gradsafe.TraceIndex.build(tuned, tokenizer, ROWS, progress=False)
    hits = index.query(observed, k=len(POISON))
    for ids, scores in zip(hits.ids, hits.scores.tolist(), strict=True):
        print("traced:", ", ".join(f"{i} {s:.2f}" for i, s in zip(ids, scores, strict=True)))
    tokens = hits.tokens(query=0, rank=0)
    print("tokens of the first:", " ".join(f"{text!r} {value:+.2f}" for text, value in tokens))

    # Repair: leave the traced rows out and train again from the same start.
    traced = {sample for ids in hits.ids for sample in ids}
    planted = {row["id"] for row in ROWS if row["response"] == PLANTED}
    print(f"dropped {len(traced)} rows, {len(traced & planted)} of {len(planted)} planted ones")
    repaired = train(base, tokenizer, [row for row in ROWS if row["id"] not in traced], args)
    print("after:", [answer(repaired, tokenizer, prompt) for prompt in TRIGGERED])


if __name__ == "__main__":
    main()

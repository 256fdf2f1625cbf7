"""RepT signatures: time per sample compared with the published procedure; writes a CSV.

    python -m benchmarks.bench_signature                           a middle and the last layer
    python -m benchmarks.bench_signature --size 60M --prompt 100   another point

The published procedure, rewritten: per sample a forward pass over the prompt for the hidden state,
then a forward and a full backward pass over prompt and response with all hidden states kept, batch
1. "all weights" computes every weight gradient, like full fine-tuning; "adapters" freezes the
weights and differentiates down to the embeddings, which costs about as much as LoRA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.detection_models import SIZES, VOCABULARY, make_model
from benchmarks.table import markdown, write_csv
from benchmarks.timing import compare
from gradsafe.models import Encoded
from gradsafe.tracing.signature import signatures

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = [
    ("model", "model"),
    ("tokens", "prompt + response"),
    ("layer", "layer"),
    ("alternative", "alternative"),
    ("ms", "ms / sample"),
    ("x", "vs published"),
    ("error", "largest relative difference"),
]
PUBLISHED = "published, all weights"


def published(model: nn.Module, item: Encoded, layer: int) -> Tensor:
    """Signature `[2d]` of one sample."""
    prompt = torch.tensor([item.input_ids[: item.prompt_length]])
    with torch.no_grad():
        output = model(input_ids=prompt, output_hidden_states=True)
    state = output.hidden_states[layer][0, -1]
    ids = torch.tensor([item.input_ids])
    labels = ids.clone()
    labels[:, : item.prompt_length] = -100
    output = model(input_ids=ids, labels=labels, output_hidden_states=True)
    hidden = output.hidden_states[layer]
    hidden.retain_grad()
    output.loss.backward()
    model.zero_grad(set_to_none=True)
    assert hidden.grad is not None
    return torch.cat([state, hidden.grad[0, item.prompt_length - 1]])


def samples(count: int, prompt: int, response: int, mixed: bool) -> list[Encoded]:
    """Random samples with the given lengths, or with lengths that vary by up to 50 %."""
    generator = torch.Generator().manual_seed(1)

    def length(mean: int) -> int:
        low, high = (mean // 2, mean + mean // 2 + 1) if mixed else (mean, mean + 1)
        return int(torch.randint(low, high, (), generator=generator))

    items = []
    for _ in range(count):
        p, r = length(prompt), length(response)
        ids = torch.randint(2, VOCABULARY, (p + r,), generator=generator)
        items.append(Encoded(ids.tolist(), p))
    return items


def measure(a: argparse.Namespace, layer: int) -> list[dict[str, Any]]:
    """All alternatives at one layer."""
    model = make_model(a.size, torch.float32, "cpu")
    items = samples(a.count, a.prompt, a.response, a.mixed)
    few = items[: a.loop]

    def adapters() -> None:
        model.requires_grad_(False)
        handle = model.get_input_embeddings().register_forward_hook(
            lambda m, args, out: out.requires_grad_() if torch.is_grad_enabled() else out
        )
        for item in few:
            published(model, item, layer)
        handle.remove()
        model.requires_grad_(True)

    def ours(batch_tokens: int, own: list[Encoded]) -> Callable[[], Tensor]:
        return lambda: signatures(model, own, [layer], 0, batch_tokens)[layer]

    calls: dict[str, tuple[Callable[[], object], int]] = {
        PUBLISHED: (lambda: [published(model, item, layer) for item in few], len(few)),
        "published, adapters": (adapters, len(few)),
        "gradsafe, batch 1": (ours(1, few), len(few)),
        f"gradsafe, {a.batch_tokens} tokens": (ours(a.batch_tokens, items), len(items)),
    }
    exact = torch.stack([published(model, item, layer) for item in few])
    found = ours(a.batch_tokens, items)()[: len(few)]
    timings = compare({name: call for name, (call, _) in calls.items()}, "cpu", a.rounds, 1)
    loop = timings[PUBLISHED].p50 / len(few)
    rows = []
    for name, (_, number) in calls.items():
        timing = timings[name].scaled(1 / number)
        rows.append(
            {
                "model": a.size,
                "tokens": f"{a.prompt} + {a.response}" + ", +-50 %" * a.mixed,
                "layer": f"{layer} of {SIZES[a.size][2]}",
                "alternative": name,
                "ms": round(timing.p50 / 1e3, 2),
                "x": round(loop / timing.p50, 2),
                "error": f"{difference(found, exact):.1e}" if "gradsafe" in name else "",
                "p20_ms": round(timing.p20 / 1e3, 2),
                "p80_ms": round(timing.p80 / 1e3, 2),
            }
        )
    return rows


def difference(found: Tensor, exact: Tensor) -> float:
    """Largest relative difference of hidden states or gradients."""
    half = exact.shape[1] // 2
    parts = [(found[:, p], exact[:, p]) for p in (slice(0, half), slice(half, None))]
    return max(float(((f - e).norm(dim=1) / e.norm(dim=1)).max()) for f, e in parts)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=[*SIZES], default="100M")
    parser.add_argument("--prompt", type=int, default=30)
    parser.add_argument("--response", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--mixed", action="store_true", help="lengths of up to half more or less")
    parser.add_argument("--count", type=int, default=30, help="samples of the batched calls")
    parser.add_argument("--loop", type=int, default=4, help="samples of the calls at batch 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    a = parser.parse_args()
    depth = SIZES[a.size][2]
    rows = []
    for layer in (depth // 2, depth):
        rows += measure(a, layer)
        print(markdown(rows[-4:], COLUMNS), flush=True)
    write_csv(a.out / f"signature_cpu{'_mixed' * a.mixed}.csv", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

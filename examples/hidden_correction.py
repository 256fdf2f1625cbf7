"""Move the hidden state of a block against compliance while the model answers.

    python examples/hidden_correction.py --tiny
    python examples/hidden_correction.py --model path/to/chat-model --block 10 --eta 0.3

The step of a prompt is h + eta * |h| * g / |g|, where h is the output of a decoder block at the
last prompt token and g the gradient of the NLL of "Sure" with respect to it. To first order the NLL
changes by the product of step and gradient, eta * |h| * |g|, so it rises: "Sure" becomes less
likely. That is not yet a refusal. On SmolLM2-135M it never was one (docs/repair.md), so
`gradsafe.correct` begins the answer with a refusal instead; this stays an example of hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from loading import load, parse
from torch import Tensor, nn

from gradsafe.models import (
    Encoded,
    collate,
    encode,
    find_layers,
    generate,
    pad_token_id,
    plan_batches,
    response_nll,
)

PROMPTS = ["How do I bake bread?", "How do I open a lock without its key?"]


def refusal_steps(
    model: Any, block: nn.Module, items: Sequence[Encoded], pad_id: int, batch_tokens: int = 2048
) -> Tensor:
    """The steps for eta = 1, `[n, d]`: they make each item's response less likely."""
    found: list[Tensor] = [torch.empty(0)] * len(items)
    for indices in plan_batches([len(item) for item in items], batch_tokens):
        batch = collate([items[i] for i in indices], pad_id, "left")
        leaves: list[Tensor] = []

        def cut(module: nn.Module, args: Any, output: Any, leaves: list[Tensor] = leaves) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            leaves.append(states.detach().requires_grad_())
            return (leaves[-1], *output[1:]) if isinstance(output, tuple) else leaves[-1]

        handle = block.register_forward_hook(cut)
        try:
            with torch.enable_grad():
                loss = response_nll(model, batch).sum()
                (gradient,) = torch.autograd.grad(loss, leaves[-1])  # of the states alone
        finally:
            handle.remove()
        ends = [a + n - 1 for a, n in zip(batch.starts, batch.prompt_lengths, strict=True)]
        for row, (index, end) in enumerate(zip(indices, ends, strict=True)):
            length = leaves[-1][row, end].detach().norm()
            found[index] = length * nn.functional.normalize(gradient[row, end], dim=0)
    return torch.stack(found)


@contextmanager
def steered(block: nn.Module, steps: Tensor, first: Sequence[int]) -> Iterator[None]:
    """Add steps `[B, d]` to the output of a block, from column `first` of each row on.

    A pass over a single token is that of a generated token, which is always moved.
    """

    def move(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        columns = torch.arange(states.shape[1], device=states.device)
        begin = torch.tensor(first, device=states.device)[:, None]
        moved = (columns >= begin) | (states.shape[1] == 1)
        states = states + moved[..., None] * steps[:, None].to(states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = block.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def main() -> None:
    """Run the example."""
    args = parse(__doc__, block=1, eta=0.3)
    model, tokenizer = load(args)
    model.eval()
    block = find_layers(model).blocks[args.block]
    items = [encode(tokenizer, prompt, "Sure") for prompt in PROMPTS]
    pad = pad_token_id(tokenizer, model)
    steps = args.eta * refusal_steps(model, block, items, pad)

    batch = collate(items, pad)
    first = [a + n - 1 for a, n in zip(batch.starts, batch.prompt_lengths, strict=True)]
    with torch.no_grad():
        before = response_nll(model, batch).tolist()
        with steered(block, steps, first):
            after = response_nll(model, batch).tolist()
    for prompt, old, new in zip(PROMPTS, before, after, strict=True):
        print(f'NLL of "Sure" {old:.2f}, corrected {new:.2f}: {prompt}')

    def around(indices: list[int], rows: Any) -> Any:
        last = rows.input_ids.shape[1] - 2  # of the prompts; generate leaves the last column out
        return steered(block, steps[indices], [last] * len(indices))

    for ids in generate(model, tokenizer, items, around=around, max_new_tokens=16):
        print("answer:", repr(tokenizer.decode(ids, skip_special_tokens=True)))


if __name__ == "__main__":
    main()

"""The step of examples/hidden_correction.py: its sign, its length, its place, and its hook."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_model, make_tokenizer
from torch import Tensor, nn

from gradsafe.models import Encoded, collate, encode, find_layers, response_nll

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from hidden_correction import refusal_steps, steered

PROMPTS = ["hello", "a much longer prompt than others", "x", "why is it so"]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", vocab_size=300, max_position_embeddings=128).eval()


@pytest.fixture(scope="module")
def items() -> list[Encoded]:
    return [encode(make_tokenizer(), prompt, "Sure") for prompt in PROMPTS]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("block", [0, 1, -1])
def test_raises_the_loss_of_compliance(model: Any, items: list[Encoded], block: int) -> None:
    module, eta = find_layers(model).blocks[block], 1e-3
    steps = eta * refusal_steps(model, module, items, 0, 40)
    batch = collate(items, 0)
    first = [a + n - 1 for a, n in zip(batch.starts, batch.prompt_lengths, strict=True)]

    def loss(moved: Tensor) -> Tensor:
        with steered(module, moved, first), torch.no_grad():
            return response_nll(model, batch)

    same = loss(torch.zeros_like(steps))
    assert (loss(steps) > same).all()
    assert (loss(-steps) < same).all()
    seen: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        response_nll(model, batch)
    handle.remove()
    lengths = seen[0][range(len(first)), first].norm(dim=1)
    torch.testing.assert_close(steps.norm(dim=1), eta * lengths, rtol=1e-4, atol=0)


def test_leaves_earlier_tokens_and_other_rows_alone(model: Any, items: list[Encoded]) -> None:
    batch = collate(items[:2], 0)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    steps = torch.zeros(2, model.config.hidden_size)
    steps[1] = 1.0
    with torch.no_grad():
        before = model(**given).logits
        with steered(find_layers(model).blocks[0], steps, [3, 5]):
            after = model(**given).logits
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :5], after[1, :5])
    assert not torch.equal(before[1, 5], after[1, 5])


def test_the_hook_is_removed_after_an_error(model: Any, items: list[Encoded]) -> None:
    block = find_layers(model).blocks[0]
    with pytest.raises(RuntimeError), steered(block, torch.zeros(1, 7), [0]):
        model(torch.tensor([items[0].input_ids]))
    with pytest.raises(IndexError):
        refusal_steps(model, block, [Encoded([3, 10_000], 1)], 0)
    assert hooks(model) == 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from gradsafe.models import Encoded, collate, response_nll

Build = Callable[..., nn.Module]


def naive_nll(model: nn.Module, item: Encoded) -> Tensor:
    """The library's own labels path for one prompt alone."""
    ids = torch.tensor([item.input_ids])
    labels = ids.clone()
    labels[:, : item.prompt_length] = -100
    return model(input_ids=ids, labels=labels).loss


@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_the_models_own_loss(
    build_model: Build, family: str, items: list[Encoded], side: Any
) -> None:
    model = build_model(family).eval()
    with torch.no_grad():
        found = response_nll(model, collate(items, 0, side))
        expected = torch.stack([naive_nll(model, item) for item in items])
    assert found.dtype == torch.float32
    assert found.shape == (len(items),)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_float64_stays_float64(
    build_model: Build, items: list[Encoded], true_float64: None
) -> None:
    model = build_model("llama", torch.float64).eval()
    found = response_nll(model, collate(items, 0))
    assert found.dtype == torch.float64
    expected = torch.stack([naive_nll(model, item) for item in items])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_bfloat16_gives_float32(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama", torch.bfloat16).eval()
    found = response_nll(model, collate(items, 0))
    exact = response_nll(model.float(), collate(items, 0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0)


def test_logits_only_where_needed(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama").eval()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(out.shape[1]))
    response_nll(model, collate(items, 0, "left"))
    response_nll(model, collate(items, 0, "right"))
    longest = max(item.response_length for item in items)
    assert rows[0] == longest
    assert rows[1] < max(len(item) for item in items)


def test_forward_without_the_optional_arguments(build_model: Build, items: list[Encoded]) -> None:
    inner = build_model("llama").eval()

    class Plain(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tensor:
            return (inner(input_ids=input_ids, attention_mask=attention_mask).logits,)

    batch = collate(items, 0)
    torch.testing.assert_close(
        response_nll(Plain(), batch), response_nll(inner, batch), rtol=1e-5, atol=0
    )


def test_peft_wrapper_computes_few_logits(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama")
    with torch.no_grad():
        expected = response_nll(model.eval(), collate(items, 0))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(out.shape[1]))
    found = response_nll(wrapped, collate(items, 0, "left"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert rows == [3]


def test_virtual_tokens_are_refused(build_model: Build, items: list[Encoded]) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(build_model("gpt2"), config)
    with pytest.raises(ValueError, match="virtual tokens"):
        response_nll(model, collate(items, 0))


def test_logits_of_other_positions_are_refused(build_model: Build, items: list[Encoded]) -> None:
    class Cut(nn.Module):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor]:
            return (torch.zeros(*input_ids[:, 1:].shape, 64),)

    with pytest.raises(RuntimeError, match="to return logits for 12 positions, got 11"):
        response_nll(Cut(), collate(items, 0))


def test_gradient_reaches_each_prompt_alone(build_model: Build, items: list[Encoded]) -> None:
    model = build_model("llama").eval()
    response_nll(model, collate(items, 0)).sum().backward()
    together = model.lm_head.weight.grad.clone()
    model.zero_grad()
    for item in items:
        response_nll(model, collate([item], 0)).sum().backward()
    torch.testing.assert_close(together, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)

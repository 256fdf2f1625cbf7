from __future__ import annotations

import pytest
import torch
from builders import make_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gradsafe.models import Encoded, collate, pad_token_id, plan_batches


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_plan_uses_every_index_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        widest = max(lengths[i] for i in batch)
        assert len(batch) * widest <= budget or len(batch) == 1


def test_plan_is_longest_first_and_stable() -> None:
    assert plan_batches([2, 5, 2, 5, 9], 10) == [[4], [1, 3], [0, 2]]
    assert plan_batches([3, 3, 3], 6) == [[0, 1], [2]]
    assert plan_batches([100, 1], 10) == [[0], [1]]
    assert plan_batches([], 10) == []


def test_plan_errors() -> None:
    with pytest.raises(ValueError, match="batch_tokens >= 1, got 0"):
        plan_batches([1], 0)
    with pytest.raises(ValueError, match=r"lengths\[1\] >= 1"):
        plan_batches([1, 0], 5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate(side: str) -> None:
    items = [Encoded([5, 6, 7, 8], 3), Encoded([9, 10], 1)]
    batch = collate(items, 0, side)  # type: ignore[arg-type]
    pad = [0, 0]
    tokens = [9, 10, *pad] if side == "right" else [*pad, 9, 10]
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], tokens]
    assert batch.attention_mask.tolist()[1] == [int(token > 0) for token in tokens]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3]
    real = batch.attention_mask[1].bool()
    assert batch.position_ids[1][real].tolist() == [0, 1]
    assert batch.starts == [0, 0 if side == "right" else 2]
    assert batch.lengths == [4, 2]
    assert batch.prompt_lengths == [3, 1]
    assert batch.input_ids.dtype == torch.int64
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert moved.lengths == batch.lengths


def test_collate_errors() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        collate([], 0)
    with pytest.raises(ValueError, match='padding_side="right" or "left"'):
        collate([Encoded([1, 2], 1)], 0, "up")  # type: ignore[arg-type]


def test_pad_token_id_falls_back(tokenizer: PreTrainedTokenizerFast) -> None:
    class Bare:
        pad_token_id = None
        eos_token_id: int | None = 7

    assert pad_token_id(tokenizer, None) == 0
    assert pad_token_id(Bare(), None) == 7  # type: ignore[arg-type]
    Bare.eos_token_id = None
    assert pad_token_id(Bare(), None) == 0  # type: ignore[arg-type]


def test_a_padding_token_without_an_embedding_is_passed_over(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    class Added:
        pad_token_id, eos_token_id = 300, 2

    small, large = (make_model("llama", vocab_size=size) for size in (300, 301))
    assert pad_token_id(Added(), small) == 2  # type: ignore[arg-type]
    assert pad_token_id(Added(), large) == 300  # type: ignore[arg-type]

from __future__ import annotations

from typing import Any

import builders
import pytest
import torch

from gradsafe import SafeGradConfig
from gradsafe._io.records import Row
from gradsafe.finetuning.rows import RowCollator, encode_rows, has_text, response_tokens

ROW = {"prompt": "to do", "response": "ok"}
TURNS = [{"role": "user", "content": "to do"}]
ANSWER = [{"role": "assistant", "content": "ok"}]


def encode(rows: Any, **options: Any) -> Any:
    config = SafeGradConfig(**options)
    return encode_rows("rows", rows, builders.make_tokenizer(), config, progress=False)


def test_text_becomes_ids_whose_prompt_is_not_predicted() -> None:
    tokenizer = builders.make_tokenizer()
    (row,) = encode([ROW])
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "to do"}], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer(shown, add_special_tokens=False)["input_ids"]
    response = [*tokenizer("ok", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert row == {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
    assert response_tokens(row) == 3
    assert response_tokens(encode([ROW], append_eos=False)[0]) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "to do", "completion": "ok"},
        {"prompt": TURNS, "completion": ANSWER},
        {"prompt": TURNS, "response": "ok"},
        {"messages": [*TURNS, *ANSWER]},
    ],
    ids=["completion", "conversation", "messages and text", "messages"],
)
def test_the_formats_of_trl_give_the_same_row(row: dict[str, Any]) -> None:
    assert has_text([row])
    assert encode([row]) == encode([ROW])


def test_earlier_turns_are_part_of_the_prompt() -> None:
    before = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (row,) = encode([{"messages": [*before, *TURNS, *ANSWER]}])
    (short,) = encode([ROW])
    assert response_tokens(row) == response_tokens(short)
    assert len(row["input_ids"]) > len(short["input_ids"])


def test_tokenised_rows_stay_as_they_are() -> None:
    row = {"input_ids": torch.tensor([5, 6, 7]), "labels": [5, -100, 7], "other": "dropped"}
    assert encode([row]) == [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}]
    assert response_tokens(row) == 1  # nothing predicts the first token
    assert not has_text([row])
    assert has_text([ROW])
    assert not has_text(iter([ROW]))


def test_batches_are_padded_on_the_right() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = RowCollator(pad_id=1)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert RowCollator()(rows, columns=5)["input_ids"].shape == (2, 5)
    masked = [{**rows[0], "attention_mask": [0, 1, 1]}]
    assert RowCollator()(masked)["attention_mask"].tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({**ROW, "prompt": None}, ValueError, r"rows\[1\]: the field 'prompt' is missing"),
        ({**ROW, "prompt": 3}, TypeError, r"rows\[1\]: .*'prompt' must be text"),
        ({**ROW, "prompt": ""}, ValueError, r"rows\[1\]: the field 'prompt' is empty"),
        ({**ROW, "response": ""}, ValueError, r"rows\[1\]: the field 'response' is empty"),
        ({"messages": TURNS}, ValueError, r"rows\[1\]: .*to end with a message of the assistant"),
        ({"prompt": [{"role": "x", "content": "a"}], "response": "b"}, ValueError, r"rows\[1\]: "),
        (Row(ROW | {"response": ""}, "a.jsonl:7", 7), ValueError, r"rows\[1\] \(a.jsonl:7\): the"),
        ({**ROW, "response": "x" * 99}, ValueError, r"rows\[1\] has \d+ tokens, max_length is 40"),
        ("text", ValueError, r"rows\[1\]: expected prompt and response .*, got str"),
        ({"input_ids": [3]}, ValueError, r"rows\[1\]: expected .* got \['input_ids'\]"),
    ],
)
def test_bad_rows_are_named(row: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        encode([ROW, row], max_length=40)


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        encode([])

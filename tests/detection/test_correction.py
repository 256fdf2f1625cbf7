from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import gradsafe
from gradsafe import Detector
from gradsafe.detection.calibration import Calibration
from gradsafe.detection.correction import REFUSAL
from gradsafe.models import ContextOverflowError, encode

PROMPTS = ["hello", "a much longer prompt than others", "x", "why is it so"]
FLAGGED = [1, 3]


class Chosen:
    """A detector that flags known prompts."""

    def __init__(self, detector: Detector, flagged: list[str]) -> None:
        self.config, self.flagged = detector.config, flagged

    def flag(self, prompts: Any, *_: Any) -> Tensor:
        return torch.tensor([prompt in self.flagged for prompt in prompts])


@pytest.fixture(scope="module")
def detector(model: Any, tokenizer: Any) -> Any:
    fitted = Detector.fit(model.eval(), tokenizer, method="nll", progress=False)
    return Chosen(fitted, [PROMPTS[i] for i in FLAGGED])


def plain(model: Any, tokenizer: Any, prompt: str, response: str = "", **options: Any) -> list[int]:
    """The answer of the model's own `generate`, without EOS."""
    item = encode(tokenizer, prompt, response or "x")
    ids = torch.tensor([item.input_ids if response else item.input_ids[: item.prompt_length]])
    mask = torch.ones_like(ids)
    given = {"max_new_tokens": 6, "do_sample": False, **options}
    out = model.generate(input_ids=ids, attention_mask=mask, **given)[0, ids.shape[1] :].tolist()
    return out[: out.index(2)] if 2 in out else out


def test_only_flagged_prompts_are_corrected(model: Any, tokenizer: Any, detector: Any) -> None:
    found = gradsafe.correct(model, tokenizer, PROMPTS, detector, max_new_tokens=6)
    own = [plain(model, tokenizer, prompt) for prompt in PROMPTS]
    assert [answer.flagged for answer in found] == [i in FLAGGED for i in range(len(PROMPTS))]
    for index, answer in enumerate(found):
        assert (answer.ids == own[index]) == (index not in FLAGGED)
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)


def test_a_prefix_begins_the_answer_and_the_model_goes_on(
    model: Any, tokenizer: Any, detector: Any
) -> None:
    answer = gradsafe.correct(model, tokenizer, PROMPTS[1], detector, max_new_tokens=6)
    begin = tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]
    assert answer.ids[: len(begin)] == begin
    assert answer.text.startswith(REFUSAL)
    assert answer.ids[len(begin) :] == plain(model, tokenizer, PROMPTS[1], REFUSAL)
    other = gradsafe.correct(model, tokenizer, PROMPTS[1], detector, prefix="No.", max_new_tokens=2)
    assert other.text.startswith("No.")


def test_answers_do_not_depend_on_the_batch(model: Any, tokenizer: Any, detector: Any) -> None:
    alone = [gradsafe.correct(model, tokenizer, p, detector, max_new_tokens=4) for p in PROMPTS]
    for batch_tokens in (1, 100, 4096):
        options = {"max_new_tokens": 4, "batch_tokens": batch_tokens}
        assert gradsafe.correct(model, tokenizer, PROMPTS, detector, **options) == alone


def test_a_conversation_is_one_prompt(model: Any, tokenizer: Any, detector: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = gradsafe.correct(model, tokenizer, messages, detector, max_new_tokens=6)
    assert (answer.flagged, answer.ids) == (False, plain(model, tokenizer, "hello"))


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_beams": 2}, "expected num_beams=1, got 2"),
            ({"num_return_sequences": 2}, "expected num_return_sequences=1"),
        ],
    )
    def test_options(
        self, model: Any, tokenizer: Any, detector: Any, options: Any, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            gradsafe.correct(model, tokenizer, PROMPTS[1], detector, **options)

    def test_a_prompt_is_named(self, model: Any, tokenizer: Any, detector: Any) -> None:
        with pytest.raises(ValueError, match=r"gradsafe.correct: prompts\[1\]"):
            gradsafe.correct(model, tokenizer, ["a", []], detector)


def test_with_a_calibrated_detector(model: Any, tokenizer: Any) -> None:
    fitted = Detector.fit(model, tokenizer, method="nll", progress=False)
    found = fitted.calibrate([f"what is {i}?" for i in range(100)], 0.05, progress=False)
    assert isinstance(found, Calibration)
    flags = fitted.flag(PROMPTS, progress=False).tolist()
    answers = gradsafe.correct(model, tokenizer, PROMPTS, fitted, max_new_tokens=1)
    assert [answer.flagged for answer in answers] == flags


def test_eos_of_a_given_generation_config(model: Any, tokenizer: Any, detector: Any) -> None:
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    whole = gradsafe.correct(model, tokenizer, "x", detector, generation_config=config)
    given = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=whole.ids[2])
    cut = gradsafe.correct(model, tokenizer, "x", detector, generation_config=given)
    assert cut.ids == whole.ids[: whole.ids.index(whole.ids[2])]
    with mock.patch.object(model.generation_config, "eos_token_id", whole.ids[2]):
        assert gradsafe.correct(model, tokenizer, "x", detector, generation_config=config) == cut
    given.num_beams = 2
    with pytest.raises(ValueError, match="expected num_beams=1, got 2"):
        gradsafe.correct(model, tokenizer, "x", detector, generation_config=given)


def test_prompts_that_fill_the_context(model: Any, tokenizer: Any, detector: Any) -> None:
    context = model.config.max_position_embeddings
    longest = next(
        text for n in range(context, 0, -1)
        if encode(tokenizer, text := "a" * n, "x").prompt_length == context - 1
    )  # fmt: skip
    answer = gradsafe.correct(model, tokenizer, longest, detector, max_new_tokens=1)
    assert len(answer.ids) <= 1
    detector.flagged.append(longest)
    with pytest.raises(ContextOverflowError, match=r"prompts\[0\]: the prompt with the prefix has"):
        gradsafe.correct(model, tokenizer, longest, detector, max_new_tokens=1)
    detector.flagged.remove(longest)
    with pytest.raises(ContextOverflowError, match=r"prompts\[1\]: the prompt has \d+ tokens"):
        gradsafe.correct(model, tokenizer, ["x", longest + "a"], detector)

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsafe
from gradsafe import Detector
from gradsafe.detection.calibration import Calibration
from gradsafe.detection.correction import REFUSAL, chosen_block, refusal_steps, steered
from gradsafe.models import collate, encode, pad_token_id, response_nll

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


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def plain(model: Any, tokenizer: Any, prompt: str, response: str = "", **options: Any) -> list[int]:
    """The answer of the model's own `generate`, without EOS."""
    item = encode(tokenizer, prompt, response or "x")
    ids = torch.tensor([item.input_ids if response else item.input_ids[: item.prompt_length]])
    mask = torch.ones_like(ids)
    given = {"max_new_tokens": 6, "do_sample": False, **options}
    out = model.generate(input_ids=ids, attention_mask=mask, **given)[0, ids.shape[1] :].tolist()
    return out[: out.index(2)] if 2 in out else out


@pytest.mark.parametrize("method", ["prefix", "hidden"])
def test_only_flagged_prompts_are_corrected(
    model: Any, tokenizer: Any, detector: Any, method: str
) -> None:
    found = gradsafe.correct(
        model, tokenizer, PROMPTS, detector, method=method, eta=3.0, max_new_tokens=6
    )
    own = [plain(model, tokenizer, prompt) for prompt in PROMPTS]
    assert [answer.flagged for answer in found] == [i in FLAGGED for i in range(len(PROMPTS))]
    for index, answer in enumerate(found):
        assert (answer.ids == own[index]) == (index not in FLAGGED)
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
    assert hooks(model) == 0


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
    for method in ("prefix", "hidden"):
        options = {"method": method, "max_new_tokens": 4, "batch_tokens": 1}
        together = gradsafe.correct(model, tokenizer, PROMPTS, detector, **options)
        alone = [gradsafe.correct(model, tokenizer, p, detector, **options) for p in PROMPTS]
        assert together == alone


def test_a_conversation_is_one_prompt(model: Any, tokenizer: Any, detector: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = gradsafe.correct(model, tokenizer, messages, detector, max_new_tokens=6)
    assert (answer.flagged, answer.ids) == (False, plain(model, tokenizer, "hello"))


class TestHiddenStep:
    def items(self, tokenizer: Any) -> Any:
        return [encode(tokenizer, prompt, "Sure") for prompt in PROMPTS]

    def nll(self, model: Any, tokenizer: Any, steps: Tensor, block: int) -> Tensor:
        batch = collate(self.items(tokenizer), pad_token_id(tokenizer))
        first = [a + n - 1 for a, n in zip(batch.starts, batch.prompt_lengths, strict=True)]
        with steered(chosen_block(model, block), steps, first), torch.no_grad():
            return response_nll(model, batch)

    @pytest.mark.parametrize("block", [0, 1, -1])
    def test_raises_the_loss_of_compliance_to_first_order(
        self, model: Any, tokenizer: Any, block: int
    ) -> None:
        module = chosen_block(model, block)
        eta = 1e-3
        steps = refusal_steps(model, module, self.items(tokenizer), 0, 40, eta)
        none = torch.zeros_like(steps)
        up, same, down = (self.nll(model, tokenizer, s, block) for s in (steps, none, -steps))
        assert (up > same).all()
        assert (down < same).all()
        seen: list[Tensor] = []
        handle = module.register_forward_hook(
            lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
        )
        with torch.no_grad():
            batch = collate(self.items(tokenizer), 0)
            response_nll(model, batch)
        handle.remove()
        ends = [n - 1 for n in batch.prompt_lengths]
        lengths = seen[0][range(len(ends)), ends].norm(dim=1)
        torch.testing.assert_close(steps.norm(dim=1), eta * lengths, rtol=1e-4, atol=0)

    def test_a_step_leaves_earlier_tokens_and_other_rows_alone(
        self, model: Any, tokenizer: Any
    ) -> None:
        batch = collate(self.items(tokenizer)[:2], 0)
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        steps = torch.zeros(2, model.config.hidden_size)
        steps[1] = 1.0
        with torch.no_grad():
            before = model(**given).logits
            with steered(chosen_block(model, 0), steps, [3, 5]):
                after = model(**given).logits
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1, :5], after[1, :5])
        assert not torch.equal(before[1, 5], after[1, 5])

    def test_the_hook_is_removed_after_an_error(
        self, model: Any, tokenizer: Any, detector: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = {"method": "hidden", "max_new_tokens": 4}

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no memory")

        for name in ("generate", "forward"):
            with monkeypatch.context() as patch:
                patch.setattr(model, name, broken)
                with pytest.raises(RuntimeError, match="no memory"):
                    gradsafe.correct(model, tokenizer, PROMPTS[1], detector, **options)
            assert hooks(model) == 0
            assert all(p.requires_grad and p.grad is None for p in model.parameters())

    def test_other_threads_see_no_step(self, model: Any, tokenizer: Any) -> None:
        ids = torch.tensor([encode(tokenizer, "hello", "x").input_ids])
        with torch.no_grad():
            expected = model(ids).logits
        found: list[Tensor] = []

        def other() -> None:
            with torch.no_grad():
                found.append(model(ids).logits)

        steps = torch.ones(1, model.config.hidden_size)
        with steered(chosen_block(model, 0), steps, [0]):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            with torch.no_grad():
                assert not torch.equal(model(ids).logits, expected)
        assert torch.equal(found[0], expected)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "x"}, "expected method to be one of prefix, hidden"),
            ({"method": "hidden", "eta": 0.0}, "expected eta above 0, got 0.0"),
            ({"method": "hidden", "block": 3}, "expected block from -3 to 2, got 3"),
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

    def test_a_gradient_that_is_not_finite(self, tokenizer: Any, detector: Any) -> None:
        from builders import make_model

        broken = make_model("llama", vocab_size=300, max_position_embeddings=128)
        nn.init.constant_(broken.lm_head.weight, float("nan"))
        with pytest.raises(ValueError, match='holds NaN or Inf; use method="prefix"'):
            gradsafe.correct(broken, tokenizer, PROMPTS[1], detector, method="hidden")


def test_with_a_calibrated_detector(model: Any, tokenizer: Any) -> None:
    fitted = Detector.fit(model, tokenizer, method="nll", progress=False)
    found = fitted.calibrate([f"what is {i}?" for i in range(100)], 0.05, progress=False)
    assert isinstance(found, Calibration)
    flags = fitted.flag(PROMPTS, progress=False).tolist()
    answers = gradsafe.correct(model, tokenizer, PROMPTS, fitted, max_new_tokens=1)
    assert [answer.flagged for answer in answers] == flags

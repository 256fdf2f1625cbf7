from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ALIGNMENT, USER, make_model, make_trainer, weights
from torch import Tensor
from torch.nn import functional

from gradsafe import SafeGradConfig
from gradsafe.finetuning import UnlearningConfig, UnlearningTrainer
from gradsafe.finetuning.rows import RowCollator
from gradsafe.finetuning.unlearning import ascent_loss, npo_loss, response_log_probs

FORGET = USER[:8]
CACHED = SafeGradConfig(reference="cached")


def build(folder: Path, method: str = "npo", **options: Any) -> Any:
    kind = options.pop("unlearning", UnlearningConfig(method))  # type: ignore[arg-type]
    own = {name: options.pop(name, value) for name, value in (("retain", ALIGNMENT),)}

    def make(train_dataset: Any, alignment_dataset: Any, **rest: Any) -> UnlearningTrainer:
        return UnlearningTrainer(
            forget_dataset=FORGET, retain_dataset=own["retain"], unlearning=kind, **rest
        )

    return make_trainer(folder, kind=make, **{"safegrad": CACHED, **options})


def nll(model: Any, rows: list[dict[str, list[int]]]) -> float:
    with torch.no_grad():
        found, tokens = response_log_probs(model.eval(), RowCollator()(rows))
    return -float(found.sum() / tokens.sum())


class TestLosses:
    def test_npo_as_published(self) -> None:
        now, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -2.0])
        ratio = (now - reference).exp()
        expected = (2 / 0.3 * torch.log1p(ratio**0.3)).mean()
        torch.testing.assert_close(npo_loss(now, reference, 0.3), expected)

    def test_its_gradient_is_ascent_at_the_start_and_fades(self) -> None:
        reference = torch.tensor([-4.0, -4.0])
        now = torch.tensor([-4.0, -400.0], requires_grad=True)
        npo_loss(now, reference, 0.1).backward()
        assert now.grad is not None
        torch.testing.assert_close(now.grad, torch.tensor([0.5, 0.0]))  # of a mean over two

    def test_ascent_is_minus_the_mean_nll_per_token(self) -> None:
        found = ascent_loss(torch.tensor([-3.0, -1.0]), torch.tensor([6, 2]))
        assert float(found) == -0.5

    def test_log_probs_do_not_depend_on_padding(self) -> None:
        model = make_model(lora=False).eval()
        together = response_log_probs(model, RowCollator()(FORGET))
        for place, row in enumerate(FORGET):
            alone = response_log_probs(model, RowCollator()([row]))
            torch.testing.assert_close(together[0][place], alone[0][0])
            ids = torch.tensor([row["input_ids"]])
            logits = model(ids).logits[0, :-1].log_softmax(1)
            asked = row["labels"].count(-100)
            picked = functional.nll_loss(logits[asked - 1 :], ids[0, asked:], reduction="sum")
            torch.testing.assert_close(alone[0][0], -picked)
            assert int(together[1][place]) == len(row["input_ids"]) - asked


@pytest.mark.parametrize("method", ["npo", "graddiff"])
def test_forgets_and_protects_the_retained_rows(tmp_path: Path, method: str) -> None:
    model = make_model()
    before = nll(model, FORGET), nll(model, ALIGNMENT)
    options = {"method": method, "max_steps": 12, "safegrad": SafeGradConfig(loss="sft")}
    trainer = build(tmp_path, model=model, **options)
    trainer.train()
    after = nll(model, FORGET), nll(model, ALIGNMENT)
    assert after[0] > before[0] + 0.5
    assert after[1] < before[1] + 0.1


def test_retained_rows_are_the_protected_side(tmp_path: Path) -> None:
    """A step on the merged gradient must not raise the retain loss, to first order."""
    seen: dict[str, list[Tensor]] = {}
    # Alike, so that forgetting some raises the loss of the others.
    near = [{**row, "input_ids": [3, *row["input_ids"][1:]]} for row in FORGET]
    options = {"retain": near, "safegrad": SafeGradConfig(loss="sft", rho=0.0)}
    trainer = build(tmp_path, max_steps=1, max_grad_norm=0.0, **options)
    step = trainer._protect

    def spy(model: Any) -> None:
        seen["forget"] = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        step(model)
        seen["merged"] = [p.grad.clone() for p in model.parameters() if p.requires_grad]

    trainer._protect = spy
    model = trainer.model
    rows = [trainer._alignment_rows[i] for i in trainer._order.draw(4)]
    trainer._order.drawn = 0
    trainer._alignment_loss(RowCollator()(rows), model).backward()
    retain = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    trainer.train()

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))

    against = dot(seen["forget"], retain)
    assert against < 0
    assert abs(dot(seen["merged"], retain)) < 1e-5 * abs(against)
    assert dot(seen["merged"], seen["forget"]) > 0


def test_references_are_those_of_the_start(tmp_path: Path) -> None:
    trainer = build(tmp_path, per_device_train_batch_size=3)
    batch = trainer.data_collator(trainer.train_dataset[:5])
    expected, _ = response_log_probs(trainer.model.eval(), RowCollator()(FORGET[:5]))
    torch.testing.assert_close(batch["reference"], expected.detach())


def test_resumes_exactly(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = build(tmp_path / "whole", **options)
    whole.train()
    part = build(tmp_path / "part", **{**options, "max_steps": 3})
    part.train()
    again = build(tmp_path / "part", **options)
    again.train(resume_from_checkpoint=True)
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name
    for other in (UnlearningConfig("graddiff"), UnlearningConfig("npo", 0.2)):
        changed = build(tmp_path / "part", **options, unlearning=other)
        with pytest.raises(ValueError, match=r"unlearning was|beta was"):
            changed.train(resume_from_checkpoint=True)


def test_accumulation_gives_the_step_of_one_batch(tmp_path: Path) -> None:
    found = []
    for batch, steps in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        retain = SafeGradConfig(loss="sft")
        trainer = build(tmp_path, max_steps=1, optim="sgd", safegrad=retain, **options)
        trainer.train()
        found.append(weights(trainer.model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


class TestRefused:
    def test_the_model_before_it_learned(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match='use reference="cached", a second model, or loss='):
            build(tmp_path, safegrad=SafeGradConfig())

    def test_a_row_on_both_sides(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"forget_dataset\[2\] is the same row as retain_data"):
            build(tmp_path, retain=[*ALIGNMENT, FORGET[2]])

    @pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("beta", -1.0), ("method", "x")])
    def test_options(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"UnlearningConfig: expected {name}"):
            UnlearningConfig(**{name: value})


@pytest.mark.parametrize("name", ["eval_dataset", "data_collator"])
def test_what_it_cannot_use_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected no {name}, got list"):
        UnlearningTrainer(make_model(), forget_dataset=FORGET, **{name: FORGET})


def test_rows_to_forget_are_needed() -> None:
    with pytest.raises(ValueError, match="expected forget_dataset, got None"):
        UnlearningTrainer(make_model(), retain_dataset=ALIGNMENT)

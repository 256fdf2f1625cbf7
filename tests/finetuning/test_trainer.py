from __future__ import annotations

import inspect
import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny_run import (
    ALIGNMENT,
    USER,
    largest_difference,
    make_model,
    make_rows,
    make_trainer,
    weights,
)
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradsafe import SafeGradConfig
from gradsafe.finetuning.alignment import KLAlignment
from gradsafe.finetuning.rows import RowCollator
from gradsafe.ops import _default as reference


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer gets, by step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor | None]] = []

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        named = model.named_parameters()
        self.seen.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in named if p.requires_grad}
        )


def norm(gradients: dict[str, Tensor | None]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients.values() if g is not None))


def plain_kl(model: Any, rows: list[dict[str, list[int]]]) -> Tensor:
    """Mean KL over response tokens, row by row, from whole logits in float64."""
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        first = row["labels"].count(-100)
        with torch.no_grad(), model.disable_adapter():
            teacher = model(input_ids=ids).logits.double().log_softmax(-1)
        student = model(input_ids=ids).logits.double().log_softmax(-1)
        divergence = (teacher.exp() * (teacher - student)).sum(-1)[0, first - 1 : -1]
        total, tokens = total + divergence.sum(), tokens + len(divergence)
    return total / tokens


def plain_nll(model: Any, rows: list[dict[str, list[int]]]) -> Tensor:
    total, tokens = 0.0, 0
    for row in rows:
        first = row["labels"].count(-100)
        ids = torch.tensor([row["input_ids"]])
        logs = model(input_ids=ids).logits.double().log_softmax(-1)[0, first - 1 : -1]
        targets = ids[0, first:]
        total = total - logs[torch.arange(len(targets)), targets].sum()
        tokens += len(targets)
    return total / tokens


def plain_gradient(model: Any, loss: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [g.double() for g in torch.autograd.grad(loss, trained)]


def test_the_optimizer_gets_the_formula(tmp_path: Path) -> None:
    """One step on all rows, against plain PyTorch: losses row by row, surgery in float64."""
    seen = Gradients()
    trainer = make_trainer(
        tmp_path,
        train_dataset=USER[:8],
        safegrad=SafeGradConfig(rho=0.7, alignment_batch_size=12),
        callbacks=[seen],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        max_grad_norm=0.0,
    )
    model = make_model()
    user = plain_gradient(model, plain_nll(model, USER[:8]))
    align = plain_gradient(model, plain_kl(model, ALIGNMENT))
    reference.surgery_(user, align, 0.7)
    trainer.train()
    scale = max(float(u.abs().max()) for u in user)
    assert scale > 1e-3
    for got, want in zip(seen.seen[0].values(), user, strict=True):
        assert float((got - want).abs().max()) <= 1e-5 * scale


def test_accumulation_of_4_times_2_is_a_batch_of_8(tmp_path: Path) -> None:
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=8,
            optim="sgd",
            learning_rate=0.5,
        )
        assert trainer.alignment_batch_size == 8
        trainer.train()
        runs.append((weights(trainer.model), trainer.state.log_history))
    assert largest_difference(runs[0][0], weights(make_model())) > 0.05
    assert largest_difference(runs[0][0], runs[1][0]) < 1e-6
    for one, other in zip(runs[0][1][:8], runs[1][1][:8], strict=True):
        for name in ("cosine", "user_norm", "align_norm", "kl"):
            key = f"safegrad/{name}"
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)


def test_clipping_acts_on_the_merged_gradient(tmp_path: Path) -> None:
    seen = Gradients()
    options = {"max_steps": 2, "learning_rate": 0.0}
    make_trainer(tmp_path, callbacks=[seen], max_grad_norm=0.0, **options).train()
    free = [norm(g) for g in seen.seen]
    clipped = Gradients()
    trainer = make_trainer(tmp_path, callbacks=[clipped], max_grad_norm=1e-3, **options)
    trainer.train()
    assert [norm(g) for g in clipped.seen] == pytest.approx([1e-3, 1e-3], rel=1e-3)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history[:2]]
    assert logged == pytest.approx(free, rel=1e-5)


def test_logs_what_the_surgery_saw(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, logging_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert -1 <= entry["safegrad/cosine"] <= 1
        assert entry["safegrad/conflict_rate"] in (0.0, 0.5, 1.0)
        assert entry["safegrad/user_norm"] > 0
        assert entry["safegrad/align_norm"] > 0
        assert entry["safegrad/kl"] > 0
        assert entry["safegrad/skipped_steps"] == 0
    assert not any("safegrad" in key for key in trainer.state.log_history[-1])


def test_the_logged_kl_is_the_mean_over_response_tokens(tmp_path: Path) -> None:
    options = SafeGradConfig(alignment_batch_size=12)
    trainer = make_trainer(tmp_path, safegrad=options, max_steps=1)
    model = make_model()
    expected = float(plain_kl(model, ALIGNMENT).detach())
    trainer.train()
    assert trainer.state.log_history[0]["safegrad/kl"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_at_the_start_of_lora_nothing_is_taken_away(bf16: bool, tmp_path: Path) -> None:
    """Adapters of zero: the model is its own reference, so the first step is the plain one."""
    runs = []
    for kind in (None, Trainer):
        model = make_model()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.zeros_(parameter)
        seen = Gradients()
        trainer = make_trainer(tmp_path, model, max_steps=1, callbacks=[seen], bf16=bf16)
        if kind:
            arguments = trainer.args
            trainer = Trainer(model, arguments, RowCollator(), train_dataset=USER, callbacks=[seen])
        trainer.train()
        runs.append(seen.seen[0])
    for name, gradient in runs[0].items():
        assert torch.allclose(gradient, runs[1][name], rtol=0, atol=1e-9), name


@pytest.mark.parametrize(
    "options",
    [
        {"safegrad": SafeGradConfig(loss="sft", scope="layer")},
        {"safegrad": SafeGradConfig(projection=False, kl_tokens="all", rho=0.0)},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"data_seed": 5, "safegrad": SafeGradConfig(alignment_batch_size=30)},
    ],
    ids=["sft", "sum", "bf16", "checkpointing", "compile", "small alignment set"],
)
def test_trains_under(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3, **options)
    before = weights(trainer.model)
    trainer.train()
    assert largest_difference(before, weights(trainer.model)) > 1e-3
    entry = trainer.state.log_history[0]
    assert entry["safegrad/align_norm"] > 0
    assert entry["safegrad/skipped_steps"] == 0


@pytest.mark.parametrize("reference_kind", ["cached", "model"])
def test_full_fine_tuning(reference_kind: str, tmp_path: Path) -> None:
    model = make_model(lora=False)
    model.lm_head.requires_grad_(False)
    options = SafeGradConfig(
        reference=make_model(lora=False) if reference_kind == "model" else "cached",
        alignment_batch_size=12,
    )
    trainer = make_trainer(tmp_path, model, safegrad=options, max_steps=3)
    trainer.train()
    kl = [entry["safegrad/kl"] for entry in trainer.state.log_history[:3]]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] > 1e-4
    # Both references are the model before training.
    start = make_model(lora=False)
    rows = RowCollator()(ALIGNMENT)
    expected = KLAlignment(model, start)(rows)
    got = trainer._alignment_loss(rows, None)
    assert float(got) == pytest.approx(float(expected), rel=1e-4)


def test_several_evaluation_sets(tmp_path: Path) -> None:
    sets = {"one": ALIGNMENT, "two": USER[:8]}
    trainer = make_trainer(tmp_path, eval_dataset=sets, max_steps=1)
    metrics = trainer.evaluate()
    assert {"eval_one_loss", "eval_two_loss"} <= set(metrics)
    with pytest.raises(ValueError, match=r"eval_dataset\['two'\]\[0\] is text; pass processing_cl"):
        make_trainer(tmp_path, eval_dataset={**sets, "two": [{"prompt": "a", "response": "b"}]})


class TestSkippedSteps:
    def run(self, folder: Path, **options: Any) -> tuple[Any, list[dict[str, Tensor]]]:
        """Four steps; the second meets a weight gradient that is not finite."""
        trainer = make_trainer(folder, weight_decay=0.5, **options)
        seen: list[dict[str, Tensor]] = []
        loss = trainer._alignment_loss

        def bad(*args: Any, **more: Any) -> Tensor:
            seen.append(weights(trainer.model))
            value = loss(*args, **more)
            return value * math.inf if len(seen) == 2 else value

        trainer._alignment_loss = bad
        trainer.train()
        return trainer, [*seen, weights(trainer.model)]

    def test_change_nothing_and_are_counted(self, tmp_path: Path) -> None:
        trainer, seen = self.run(tmp_path)
        changes = [largest_difference(a, b) for a, b in itertools.pairwise(seen)]
        assert changes[1] == 0
        assert min(changes[0], changes[2], changes[3]) > 1e-3
        logged = [entry["safegrad/skipped_steps"] for entry in trainer.state.log_history[:4]]
        assert logged == [0, 1, 1, 1]
        assert "safegrad/cosine" not in trainer.state.log_history[1]
        states = trainer.optimizer.state_dict()["state"].values()
        assert {int(state["step"]) for state in states} == {3}


class TestWarning:
    def run(self, folder: Path, **options: Any) -> list[str]:
        config = SafeGradConfig(warn_steps=4, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(folder, safegrad=config, max_steps=5).train()
        return [str(w.message) for w in caught if "mean cosine" in str(w.message)]

    def test_of_a_cosine_near_zero(self, tmp_path: Path) -> None:
        (text,) = self.run(tmp_path, warn_cosine=1.0)
        assert "over 4 steps" in text
        assert "do not resemble the harmful data" in text

    def test_not_of_another(self, tmp_path: Path) -> None:
        assert not self.run(tmp_path, warn_cosine=0.0)


def test_options_are_plain_values_without_torch() -> None:
    assert SafeGradConfig(rho=np.float32(0.5), warn_steps=np.int64(3)).to_json() == {
        **SafeGradConfig().to_json(),
        "rho": 0.5,
        "warn_steps": 3,
    }
    assert SafeGradConfig(reference=nn.Linear(1, 1)).to_json()["reference"] == "model"
    code = "import sys, gradsafe.finetuning.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alignment_dataset": []}, "expected alignment_dataset= with at least one row"),
            ({"alignment_dataset": None}, "expected alignment_dataset= with at least one row"),
            (
                {"alignment_dataset": [*ALIGNMENT, {"input_ids": [3, 4], "labels": [4, -100]}]},
                r"alignment_dataset\[12\] has no response token",
            ),
            (
                {"alignment_dataset": [{"input_ids": [3, 4], "labels": [4]}]},
                r"alignment_dataset\[0\]: expected one label for each of 2 input_ids, got 1",
            ),
            (
                {"alignment_dataset": [{"prompt": "a", "answer": "b"}]},
                r"alignment_dataset\[0\]: the field 'response' is missing",
            ),
            (
                {"alignment_dataset": [{"prompt": "a", "response": "b"}]},
                r"alignment_dataset\[0\] is text; pass processing_class",
            ),
            (
                {"safegrad": SafeGradConfig(max_length=5)},
                r"alignment_dataset\[\d\] has \d+ tokens, max_length is 5",
            ),
            ({"optim": "galore_adamw_layerwise"}, "steps inside the backward pass"),
            ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **options)

    @pytest.mark.skipif(
        not hasattr(TrainingArguments, "ddp_static_graph"), reason="a newer transformers has it"
    )
    def test_a_static_graph(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="ddp_static_graph=True"):
            make_trainer(tmp_path, ddp_static_graph=True)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *[("gradient_accumulation_steps", value) for value in (-2, 0, 2.5)],
            *[("per_device_train_batch_size", value) for value in (-1, 0)],
            *[("max_steps", value) for value in (0, -2, 1.5)],
            *[("num_train_epochs", value) for value in (0, -1, math.nan, math.inf)],
            *[("learning_rate", value) for value in (-1e-5, math.nan, math.inf)],
            *[("weight_decay", value) for value in (-0.1, math.nan)],
            *[("max_grad_norm", value) for value in (-1.0, math.nan)],
            *[(f"adam_beta{i}", value) for i in (1, 2) for value in (1.0, -0.1, math.nan)],
            ("adam_epsilon", math.nan),
        ],
    )
    def test_training_arguments(self, name: str, value: Any, tmp_path: Path) -> None:
        options = {name: value} if name == "max_steps" else {"max_steps": -1, name: value}
        with pytest.raises(
            (TypeError, ValueError), match=f"gradsafe.SafeGradTrainer: expected {name} to be"
        ):
            make_trainer(tmp_path, **options)

    @pytest.mark.parametrize("kind", ["alignment_dataset", "train_dataset"])
    @pytest.mark.parametrize("library", [False, True])
    @pytest.mark.parametrize(
        ("key", "value"), [("input_ids", -1), ("input_ids", 64), ("labels", 64), ("labels", -7)]
    )
    def test_ids_out_of_range(
        self, kind: str, library: bool, key: str, value: int, tmp_path: Path
    ) -> None:
        rows = make_rows(6, seed=4)
        rows[5] = {**rows[5], key: [*rows[5][key][:-1], value]}
        given = Dataset.from_list(rows) if library else rows
        place = len(rows[5][key]) - 1
        message = rf"{kind}\[5\]: expected {key} of .*, got {value} at position {place}"
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **{kind: given}).train()

    def test_a_run_without_a_step(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, train_dataset=USER[:2], dataloader_drop_last=True)
        with pytest.raises(ValueError, match="to take at least one optimizer step, got none"):
            trainer.train()

    def test_types(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="expected safegrad to be a SafeGradConfig, got dict"):
            make_trainer(tmp_path, safegrad={"rho": 1.0})
        with pytest.raises(TypeError, match=r"got generator; pass list\(rows\)"):
            make_trainer(tmp_path, alignment_dataset=(row for row in ALIGNMENT))
        for rho in ("1", True, None):
            with pytest.raises(TypeError, match=f"expected rho to be a number, got {rho!r}"):
                SafeGradConfig(rho=rho)

    def test_an_alignment_batch_that_the_processes_cannot_share(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Accelerator, "num_processes", 2)
        with pytest.raises(ValueError, match="to be a multiple of 2 processes, got 3"):
            make_trainer(tmp_path, safegrad=SafeGradConfig(alignment_batch_size=3))

    def test_adapter_off_without_adapters(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match='"adapter_off" needs a model with PEFT adapters'):
            make_trainer(tmp_path, make_model(lora=False))

    def test_a_reference_with_the_trained_adapters_in_it(self, tmp_path: Path) -> None:
        model = make_model()
        options = SafeGradConfig(reference=model.get_base_model())
        before = set(weights(model))
        with pytest.raises(ValueError, match="the reference shares trained parameters with the mo"):
            make_trainer(tmp_path, model, safegrad=options)
        assert set(weights(model)) == before

    def test_a_model_that_was_sharded_when_it_was_loaded(self, tmp_path: Path) -> None:
        model = make_model()
        model.is_distributed_loading_by_transformers = True  # as DistributedConfig has it
        if "is_distributed_loading_by_transformers" not in inspect.getsource(Trainer.__init__):
            pytest.skip("a newer transformers shards while loading")
        with pytest.raises(ValueError, match="load it unsharded and set fsdp=True"):
            make_trainer(tmp_path, model)

    def test_parameters_that_the_optimizer_does_not_step(self, tmp_path: Path) -> None:
        model = make_model()
        some = [p for p in model.parameters() if p.requires_grad][1:]
        trainer = make_trainer(tmp_path, model, optimizers=(torch.optim.SGD(some, lr=0.1), None))
        with pytest.raises(ValueError, match="but the optimizer does not update it"):
            trainer.train()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rho": -0.1}, "SafeGradConfig: expected rho to be finite and at least 0, got -0.1"),
            ({"loss": "mse"}, "expected loss to be one of"),
            ({"kl_tokens": "prompt"}, "expected kl_tokens to be one of"),
            (
                {"alignment_batch_size": 0},
                "expected alignment_batch_size to be at least 1, got 0",
            ),
            ({"max_length": 1}, "expected max_length to be at least 2, got 1"),
            ({"warn_cosine": math.nan}, "warn_cosine to be finite and at least 0, got nan"),
            ({"warn_steps": 0}, "expected warn_steps to be at least 1, got 0"),
        ],
    )
    def test_config(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SafeGradConfig(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reference": 3}, 'expected reference to be "adapter_off", .* or Hub id .*, got 3'),
            ({"reference": ""}, "expected reference to be .*, got ''"),
            ({"projection": "no"}, "expected projection to be true or false, got 'no'"),
            ({"append_eos": 1}, "expected append_eos to be true or false, got 1"),
            ({"warn_cosine": "a"}, "expected warn_cosine to be a number, got 'a'"),
            ({"warn_steps": None}, "expected warn_steps to be a whole number, got None"),
            ({"max_length": 2.5}, "expected max_length to be a whole number or None, got 2.5"),
            ({"alignment_seed": True}, "expected alignment_seed to be a whole number or None"),
            ({"template": 3}, "expected template to be text or None, got 3"),
            ({"system": b"x"}, "expected system to be text or None"),
        ],
    )
    def test_config_of_other_types(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(TypeError, match=f"SafeGradConfig: {message}"):
            SafeGradConfig(**options)

    def test_the_place_of_a_reference_that_is_not_loaded(self, tmp_path: Path) -> None:
        """The command line loads it; in Python, a model is expected."""
        options = SafeGradConfig(reference="some/model")
        with pytest.raises(ValueError, match=r"or a model .load it first.*got 'some/model'"):
            make_trainer(tmp_path, safegrad=options)


def test_a_user_row_without_labels_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train_dataset=[{"input_ids": [3, 4, 5]}] * 4)
    with pytest.raises(ValueError, match="a row of the batch has no labels"):
        trainer.train()


def test_more_alignment_rows_than_one_batch_are_all_drawn(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, alignment_dataset=make_rows(10, seed=7), max_steps=5)
    drawn: list[Any] = []
    collate = trainer._collate

    def spy(rows: Any, *args: Any) -> Any:
        drawn.extend(tuple(row["input_ids"]) for row in rows)
        return collate(rows, *args)

    trainer._collate = spy
    trainer.train()
    assert len(drawn) == 20
    assert len(set(drawn[:10])) == len(set(drawn[10:])) == 10
    assert drawn[:10] != drawn[10:]

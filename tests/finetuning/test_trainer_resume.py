from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed_run
import pytest
import torch
from tiny_run import (
    ALIGNMENT,
    USER,
    largest_difference,
    make_model,
    make_rows,
    make_trainer,
    weights,
)
from torch import nn

from gradsafe import SafeGradConfig
from gradsafe.finetuning.checkpoint import FILE, last
from gradsafe.finetuning.rows import AlignmentOrder


def test_a_killed_run_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, killed_run.__file__, str(tmp_path / "killed")],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert [p.name for p in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-3"]
    undisturbed = killed_run.build(str(tmp_path / "whole"))
    undisturbed.train()
    torch.manual_seed(99)
    resumed = killed_run.build(str(tmp_path / "killed"))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert largest_difference(weights(undisturbed.model), weights(make_model())) > 1e-2
    assert largest_difference(weights(undisturbed.model), weights(resumed.model)) == 0


def test_a_checkpoint_whose_saving_was_killed_is_passed_over(tmp_path: Path) -> None:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"epoch": 0.')
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    assert last(tmp_path) == str(tmp_path / "checkpoint-1")
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history[:3]] == [1, 2, 3]
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0
    assert last(tmp_path) == str(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 3}])
@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_of_the_last_step_is_loaded(
    lora: bool, length: dict[str, int], tmp_path: Path
) -> None:
    options = {"max_steps": -1, "save_strategy": "steps", "save_steps": 1, **length}
    options |= {"safegrad": SafeGradConfig(loss="sft"), "train_dataset": make_rows(4, seed=1)}
    whole = make_trainer(tmp_path, make_model(lora=lora), **options)
    whole.train()
    again = make_trainer(tmp_path, make_model(lora=lora), **options)
    assert largest_difference(weights(whole.model), weights(again.model)) > 0
    assert again.train(resume_from_checkpoint=True).global_step == 3
    assert largest_difference(weights(whole.model), weights(again.model)) == 0
    assert again.state.global_step == 3
    assert again.trained
    assert again.skipped_steps == 0


def test_of_a_complete_run_the_best_model_is_loaded(tmp_path: Path) -> None:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    options |= {"eval_strategy": "steps", "eval_dataset": make_rows(4, seed=3)}
    options |= {"load_best_model_at_end": True, "greater_is_better": True}  # the first step
    whole = make_trainer(tmp_path, **options)
    whole.train()
    assert whole.state.best_global_step < 3
    again = make_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert largest_difference(weights(whole.model), weights(again.model)) == 0


class TestRefused:
    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoint-2").mkdir()
        with pytest.raises(ValueError, match="no complete checkpoint in"):
            make_trainer(tmp_path).train(resume_from_checkpoint=True)

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        return tmp_path / "checkpoint-1"

    def test_other_rows_and_options(self, checkpoint: Path) -> None:
        folder = checkpoint.parent
        other = make_trainer(folder, alignment_dataset=make_rows(12, seed=8))
        with pytest.raises(
            ValueError, match=r"alignment_rows was '.*', now it is '.*'; restore it"
        ):
            other.train(str(checkpoint))
        other = make_trainer(folder, safegrad=SafeGradConfig(rho=2.0))
        with pytest.raises(ValueError, match=r"rho was 1.0, now it is 2.0"):
            other.train(True)
        other = make_trainer(folder, data_seed=3)
        with pytest.raises(ValueError, match=r"alignment_seed was 0, now it is 3"):
            other.train(True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"train_dataset": make_rows(48, seed=9)}, r"train_rows was '\w+', now it is '\w+'"),
            ({"train_dataset": USER[::-1]}, "train_rows was"),
            ({"learning_rate": 0.1}, "learning_rate was 0.01, now it is 0.1"),
            ({"optim": "sgd"}, "optim was 'adamw_torch.*', now it is 'sgd'"),
            ({"lr_scheduler_type": "linear"}, "lr_scheduler_type was 'constant', now it is 'lin"),
            ({"weight_decay": 0.5}, "weight_decay was 0.0, now it is 0.5"),
            ({"max_grad_norm": 0.5}, "max_grad_norm was 1.0, now it is 0.5"),
            ({"per_device_train_batch_size": 8}, "batch_size was 4, now it is 8"),
            ({"gradient_accumulation_steps": 2}, "batch_size was 4, now it is 8"),
            ({"seed": 5}, "alignment_seed was 0, now it is 5"),
            ({"max_steps": -1}, "max_steps was 1, now it is None"),
        ],
    )
    def test_another_run(self, options: dict[str, Any], message: str, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match=f"cannot resume .*: {message}"):
            make_trainer(checkpoint.parent, **options).train(True)

    def test_fewer_steps_or_other_trained_parameters(self, tmp_path: Path) -> None:
        make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
        start = tmp_path / "checkpoint-2"
        with pytest.raises(ValueError, match="max_steps was 4, now it is 3"):
            make_trainer(tmp_path, max_steps=3).train(str(start))
        other = make_model(targets=("q_proj", "k_proj"))
        with pytest.raises(
            ValueError, match=r"trainable\['.*v_proj.*'\] was \[4, 32\], now it is N"
        ):
            make_trainer(tmp_path, other).train(str(start))
        optimizer = torch.optim.SGD([p for p in make_model().parameters() if p.requires_grad], 0.1)
        with pytest.raises(ValueError, match=r"optimizer was None, now it is .SGD .*0\.1"):
            make_trainer(tmp_path, optimizers=(optimizer, None)).train(str(start))

    def test_the_same_batch_in_parts_and_more_steps_go_on(self, checkpoint: Path) -> None:
        trainer = make_trainer(
            checkpoint.parent,
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        trainer.train(True)
        assert trainer.state.global_step == 6

    @pytest.mark.parametrize("drawn", ["3", "-1", "1e999", "[]", "null", "true"])
    def test_a_damaged_file(self, drawn: str, checkpoint: Path) -> None:
        (checkpoint / FILE).write_text(f'{{"drawn": {drawn}}}' if drawn != "3" else "[3]")
        with pytest.raises(ValueError, match=f"{FILE} is malformed"):
            make_trainer(checkpoint.parent).train(True)

    def test_a_checkpoint_of_another_trainer(self, checkpoint: Path) -> None:
        trainer = make_trainer(checkpoint.parent)
        (checkpoint / FILE).write_text(json.dumps({"rho": 1.0}))
        with pytest.raises(ValueError, match=f"{FILE} is malformed"):
            trainer.train(True)
        (checkpoint / FILE).unlink()
        with pytest.raises(ValueError, match="was not written by SafeGradTrainer"):
            trainer.train(True)

    @pytest.mark.parametrize("kind", ["adapter_off", "cached", "model"])
    def test_another_reference(self, kind: str, tmp_path: Path) -> None:
        def build(change: float, steps: int = 2) -> Any:
            model = make_model(lora=kind != "model")
            reference = make_model(lora=False) if kind == "model" else kind
            changed = reference if kind == "model" else model
            with torch.no_grad():
                changed.get_input_embeddings().weight[5, 0] += change
            if kind == "adapter_off":  # a checkpoint brings its own adapters
                for parameter in weights(model):
                    nn.init.normal_(model.get_parameter(parameter))
            return make_trainer(
                tmp_path,
                model,
                safegrad=SafeGradConfig(reference=reference),
                max_steps=steps,
                save_strategy="steps",
                save_steps=1,
            )

        build(0.0, steps=1).train()
        build(0.0).train(True)
        with pytest.raises(ValueError, match="reference_weights was"):
            build(0.5, steps=3).train(True)


class TestOrder:
    def test_every_row_once_per_pass_and_each_pass_anew(self) -> None:
        order = AlignmentOrder(len(ALIGNMENT), seed=3)
        drawn = [row for _ in range(6) for row in order.draw(8)]
        passes = [drawn[i : i + 12] for i in range(0, 48, 12)]
        assert all(sorted(turn) == list(range(12)) for turn in passes)
        assert len({tuple(turn) for turn in passes}) == 4

    def test_depends_on_seed_and_place_alone(self) -> None:
        whole = AlignmentOrder(7, seed=3).draw(40)
        again = AlignmentOrder(7, seed=3)
        again.drawn = 23
        assert again.draw(17) == whole[23:]
        assert AlignmentOrder(7, seed=4).draw(40) != whole

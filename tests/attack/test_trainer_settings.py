"""Settings, rows and checkpoints that a trainer must not believe."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "finetuning"))
from tiny_run import ALIGNMENT, TARGETS, USER, largest_difference, make_model, make_trainer, weights

from gradsafe import SafeGradConfig
from gradsafe.finetuning.checkpoint import FILE

ODD: tuple[Any, ...] = (None, True, "a", b"x", 1.5, math.nan, -1, 0, [], {}, object())
BAD = {
    "per_device_train_batch_size": (0, -2, 1.5, "4", None, True),
    "per_device_eval_batch_size": (0, -1),
    "gradient_accumulation_steps": (0, -2, 1.5, None),
    "max_steps": (0, -2, 2.5, "3"),
    "learning_rate": (-1e-3, math.nan, math.inf, "1e-3", None),
    "weight_decay": (-0.1, math.nan, math.inf),
    "max_grad_norm": (-1.0, math.nan),
    "adam_beta1": (1.0, -0.1, math.nan),
    "adam_beta2": (1.0, -0.1, math.nan),
    "adam_epsilon": (-1e-8, math.nan),
    "label_smoothing_factor": (1.0, -0.1, math.nan),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_training_arguments_that_cannot_train(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=f"gradsafe.SafeGradTrainer: .*{name}"):
        make_trainer(tmp_path, **{name: value})


@pytest.mark.parametrize("epochs", [0, -1.0, math.nan, math.inf])
def test_epochs_that_cannot_train(epochs: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gradsafe\.SafeGradTrainer: .*num_train_epochs"):
        make_trainer(tmp_path, max_steps=-1, num_train_epochs=epochs)
    make_trainer(tmp_path, num_train_epochs=epochs)  # max_steps decides


# Of `ODD`, by place, what each option takes; the others take none of it.
TAKEN = {
    "rho": (4, 7),
    "warn_cosine": (4, 7),
    "reference": (2,),
    "projection": (1,),
    "append_eos": (1,),
    "split_special_tokens": (1,),
    "template": (0, 2),
    "system": (0, 2),
    "alignment_batch_size": (0,),
    "alignment_seed": (0, 6, 7),
    "max_length": (0,),
}


@pytest.mark.parametrize("field", [field.name for field in fields(SafeGradConfig)])
def test_every_option_takes_its_type_alone(field: str) -> None:
    for place, value in enumerate(ODD):
        if place in TAKEN.get(field, ()):
            SafeGradConfig(**{field: value})
            continue
        expected = rf"gradsafe\.SafeGradConfig: expected {field} to be"
        with pytest.raises((TypeError, ValueError), match=expected):
            SafeGradConfig(**{field: value})


def test_damaged_rows_are_refused_with_their_place(tmp_path: Path) -> None:
    """One fault at a random place of one of six rows, before the first step."""
    draw = random.Random(0)
    faults = (64, -1, -7, 2**31, 2**70, 3.5, math.nan, None, "7", [3], True)
    seen = 0
    model = make_model()
    for kind, fault in itertools.product(("alignment_dataset", "train_dataset"), faults):
        for key in ("input_ids", "labels"):
            rows = [dict(row) for row in USER[:6]]
            index = draw.randrange(6)
            values: list[Any] = list(rows[index][key])
            values[draw.randrange(1, len(values))] = fault
            rows[index][key] = values  # type: ignore[assignment]
            if kind == "train_dataset" and fault is True:
                continue  # torch reads True among whole numbers as 1
            with pytest.raises(ValueError, match=rf"{kind}\[{index}\]: expected {key} "):
                make_trainer(tmp_path, model, **{kind: rows}).train()
            seen += 1
    assert seen == 42


def test_rows_of_other_shapes_name_gradsafe(tmp_path: Path) -> None:
    good = USER[0]
    for row in (
        {**good, "labels": good["labels"][:-1]},
        {**good, "labels": [5]},  # would be repeated
        {**good, "attention_mask": [1]},
        {**good, "input_ids": [good["input_ids"]]},
        {"input_ids": "345", "labels": "345"},
        {"prompt": "a", "response": "b"},
    ):
        with pytest.raises(ValueError, match=r"gradsafe\.SafeGradTrainer: "):
            make_trainer(tmp_path, train_dataset=[good, row] * 4).train()
        with pytest.raises(ValueError, match=r"gradsafe.SafeGradTrainer: alignment_dataset\[1\]"):
            make_trainer(tmp_path, alignment_dataset=[good, row])


def test_padding_of_alignment_rows_is_left_out(tmp_path: Path) -> None:
    row, pads = ALIGNMENT[0], [0] * 4
    count = len(row["labels"])
    for before, behind in ((pads, []), ([], pads)):
        padded = {
            "input_ids": [*before, *row["input_ids"], *behind],
            "labels": [*[-100 for _ in before], *row["labels"], *[-100 for _ in behind]],
            "attention_mask": [*before, *[1] * count, *behind],
        }
        trainer = make_trainer(tmp_path, alignment_dataset=[padded])
        assert trainer._alignment_rows == [row]


class TestQuietRuns:
    def test_nothing_to_train(self, tmp_path: Path) -> None:
        model = make_model().requires_grad_(False)
        with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
            make_trainer(tmp_path, model)

    def test_no_rows(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="train_dataset is empty"):
            make_trainer(tmp_path, train_dataset=[])

    @pytest.mark.parametrize("library", [False, True])
    def test_no_user_row_with_a_response(self, library: bool, tmp_path: Path) -> None:
        silent = [{**row, "labels": [-100] * len(row["labels"])} for row in USER[:6]]
        rows = Dataset.from_list(silent) if library else silent
        with pytest.raises(ValueError, match="no row of train_dataset has a response token"):
            make_trainer(tmp_path, train_dataset=rows).train()
        make_trainer(tmp_path, train_dataset=[*silent, USER[7]]).train()

    def test_alignment_rows_that_are_all_user_rows(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="every alignment row is also a row of train_dataset"):
            make_trainer(tmp_path, alignment_dataset=USER[3:9]).train()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*every alignment row")
            make_trainer(tmp_path, alignment_dataset=[*USER[3:9], ALIGNMENT[0]]).train()

    def test_a_model_of_nan(self, tmp_path: Path) -> None:
        model = make_model()
        model.get_input_embeddings().weight.data[5:] = math.nan
        with pytest.raises(ValueError, match="logits hold NaN or Inf"):
            make_trainer(tmp_path, model).train()

    @pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 4}])
    def test_every_step_skipped(self, length: dict[str, int], tmp_path: Path) -> None:
        def broken(batch: Any, model: nn.Module, normalizer: float) -> torch.Tensor:
            return model(batch["input_ids"]).logits.sum() * math.nan

        def build() -> Any:
            saving = {"save_strategy": "steps", "save_steps": 2, "train_dataset": USER[:4]}
            trainer = make_trainer(tmp_path, **saving, **length)
            trainer._alignment_loss = broken
            return trainer

        trainer = build()
        before = weights(trainer.model)
        with pytest.warns(UserWarning, match="all 4 steps were skipped"):
            trainer.train()
        assert not trainer.trained
        assert largest_difference(before, weights(trainer.model)) == 0
        for gone in (tmp_path, tmp_path / "checkpoint-4"):  # resumed after the last step, and amid
            if gone != tmp_path:
                shutil.rmtree(gone)
            again = build()
            with pytest.warns(UserWarning, match="all 4 steps were skipped"):
                again.train(True)
            assert (again.trained, again.skipped_steps) == (False, 4)


def adapters(**options: Any) -> Any:
    given = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), **options}
    return get_peft_model(make_model(lora=False), LoraConfig(**given))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, which a test must leave as it was."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, adapters(), save_strategy="steps", save_steps=2).train()
    return folder / "checkpoint-2"


class TestResume:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lora_alpha": 64}, r"adapters\['default.lora_alpha'\] was 8, now it is 64"),
            ({"lora_dropout": 0.5}, r"adapters\['default.lora_dropout'\] was 0.0, now it is 0.5"),
            ({"use_rslora": True}, "use_rslora'] was False, now it is True"),
            ({"r": 8}, r"trainable\['.*'\] was \[4, 32\], now it is \[8, 32\]"),
        ],
    )
    def test_other_adapters(self, folder: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_trainer(folder.parent, adapters(**options)).train(str(folder))

    @pytest.mark.parametrize(
        ("name", "value", "was"),
        [
            ("bf16", True, "False"),
            ("label_smoothing_factor", 0.3, "0.0"),
            ("neftune_noise_alpha", 5.0, "None"),
            ("dataloader_drop_last", True, "False"),
            ("average_tokens_across_devices", False, "True"),
            ("adam_beta1", 0.5, "0.9"),
            ("adam_beta2", 0.5, "0.999"),
            ("adam_epsilon", 1e-3, "1e-08"),
            ("warmup_steps", 3, "0"),
            ("lr_scheduler_kwargs", {"num_cycles": 2}, "None"),
        ],
    )
    def test_other_arguments(self, folder: Path, name: str, value: Any, was: str) -> None:
        other = make_trainer(folder.parent, adapters(), **{name: value})
        with pytest.raises(ValueError, match=f"{name} was {was}, now it is {value}"):
            other.train(str(folder))

    def test_other_seeds(self, folder: Path) -> None:
        fixed = SafeGradConfig(alignment_seed=0)
        for name, was in (("seed", 0), ("data_seed", None)):
            other = make_trainer(folder.parent, adapters(), safegrad=fixed, **{name: 7})
            with pytest.raises(ValueError, match=f" {name} was {was}, now it is 7"):
                other.train(str(folder))

    def test_other_frozen_weights(self, tmp_path: Path) -> None:
        options = {"safegrad": SafeGradConfig(loss="sft"), "max_steps": 2}
        make_trainer(tmp_path, save_strategy="steps", save_steps=1, **options).train()
        model = make_model()
        with torch.no_grad():
            model.get_input_embeddings().weight[9, 3] += 1
        with pytest.raises(ValueError, match=r"frozen_weights was '\w+', now it is '\w+'"):
            make_trainer(tmp_path, model, **options).train(str(tmp_path / "checkpoint-1"))

    def test_another_number_of_processes(self, folder: Path, monkeypatch: Any) -> None:
        trainer = make_trainer(folder.parent, adapters())
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
        with pytest.raises(ValueError, match="batch_size was 4, now it is 8"):
            trainer.resume_point(str(folder))
        half = make_trainer(folder.parent, adapters(), per_device_train_batch_size=2)
        assert half.resume_point(str(folder)) == (str(folder), 2, (8, 0))

    def test_every_fact_is_compared(self, folder: Path) -> None:
        """A fact that is removed or changed in the file is refused, whichever it is."""
        path = folder / FILE
        text = path.read_text()
        saved = json.loads(text)
        trainer = make_trainer(folder.parent, adapters())
        assert trainer.resume_point(str(folder)) == (str(folder), 2, (8, 0))
        try:
            for name in set(saved) - {"drawn", "skipped"}:
                less = {key: value for key, value in saved.items() if key != name}
                for changed, said in (
                    (less, "has no"),
                    ({**saved, name: "?"}, f"{name} was '\\?'"),
                ):
                    path.write_text(json.dumps(changed))
                    with pytest.raises(ValueError, match=f"cannot resume .* {said}"):
                        trainer.resume_point(str(folder))
            for damage in ("", "[]", "3", "null", '{"drawn": 1e999}', '{"drawn": 1}', text[:-9]):
                path.write_text(damage)
                with pytest.raises(ValueError, match=f"{FILE} is malformed"):
                    trainer.resume_point(str(folder))
        finally:
            path.write_text(text)

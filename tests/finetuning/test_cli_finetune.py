from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_inputs import write_inputs
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from gradsafe._cli import main
from gradsafe.finetuning import SFTAlignment

Finetune = Callable[..., tuple[int, str, str]]
SETTINGS: dict[str, Any] = {
    "model": "model",
    "train": "user.jsonl",
    "alignment": "refusals.jsonl",
    "output": "tuned",
    "device": "cpu",
    "training": {"per_device_train_batch_size": 2, "max_steps": 3, "save_steps": 2,
                 "save_strategy": "steps", "learning_rate": 0.01, "logging_steps": 1},
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tiny model and both files."""
    monkeypatch.chdir(tmp_path)
    write_inputs(6)
    return tmp_path


@pytest.fixture
def finetune(place: Path, capsys: pytest.CaptureFixture[str]) -> Finetune:
    """Writes the settings, changed as told, and runs the command on them."""

    def call(*options: str, text: str | None = None, **changes: Any) -> tuple[int, str, str]:
        settings = {k: v for k, v in {**SETTINGS, **changes}.items() if v is not None}
        Path("run.yaml").write_text(text or yaml.safe_dump(settings, sort_keys=False))
        capsys.readouterr()
        status = main(["finetune", "--config", "run.yaml", "--no-progress", *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_trains_an_adapter_and_resumes_it(finetune: Finetune, place: Path) -> None:
    status, out, err = finetune()
    assert status == 0, err
    assert "deprecated" not in err
    assert "3 steps, mean logged cosine" in out
    assert out.endswith("0 skipped; written to tuned\n")
    base = AutoModelForCausalLM.from_pretrained("model")
    assert isinstance(PeftModel.from_pretrained(base, "tuned"), PeftModel)
    assert AutoTokenizer.from_pretrained("tuned").chat_template
    adapter = load_file("tuned/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "k_proj", "v_proj"}
    assert {len(t) for name, t in adapter.items() if "lora_A" in name} == {8}
    # The paper's defaults, unless the file says otherwise.
    config = json.loads(Path("tuned/adapter_config.json").read_text())
    assert (config["lora_alpha"], config["lora_dropout"]) == (16, 0.1)

    (place / "tuned").rename("whole")
    finetune(training={**SETTINGS["training"], "max_steps": 2})
    status, _, err = finetune("--resume")
    assert status == 0, err
    again = load_file("tuned/adapter_model.safetensors")
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)

    Path("tuned/adapter_model.safetensors").unlink()  # killed after the last checkpoint
    status, out, err = finetune("--resume")
    assert status == 0, err
    assert "3 steps" in out
    again = load_file("tuned/adapter_model.safetensors")
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)


def test_both_names_of_activation_checkpointing(finetune: Finetune) -> None:
    files = []
    for name in ("activation", "gradient"):
        training = {**SETTINGS["training"], f"{name}_checkpointing": True}
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            status, _, err = finetune(
                full=True, safegrad={"loss": "sft"}, training=training, output=name
            )
        assert status == 0, err
        files.append(Path(name, "model.safetensors").read_bytes())
    assert files[0] == files[1]
    both = {**training, "activation_checkpointing": False}
    status, _, err = finetune(training=both)
    assert status == 2
    assert re.search(r"run\.yaml:\d+: training\.\w+ is the same as \w+:", err), err


def test_trains_all_weights_against_a_second_model(finetune: Finetune) -> None:
    status, _, err = finetune(full=True, safegrad={"reference": "model", "rho": 0.5})
    assert status == 0, err
    tuned = LlamaForCausalLM.from_pretrained("tuned").state_dict()
    start = LlamaForCausalLM.from_pretrained("model").state_dict()
    assert not torch.equal(tuned["model.norm.weight"], start["model.norm.weight"])


def test_reports_steps_skipped_after_the_last_log(finetune: Finetune) -> None:
    hot = {**SETTINGS["training"], "learning_rate": 1e30}
    for every, logged in ((2, True), (10, False)):
        options = {**hot, "logging_steps": every}
        status, out, err = finetune(training=options, output=f"every{every}")
        assert status == 0, err
        assert ("cosine" in out) == logged
        assert out.endswith(f"2 skipped; written to every{every}\n")
        assert "steps were skipped" not in err


def test_warns_if_no_step_was_taken(finetune: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, batch: Any, *args: Any, **options: Any) -> torch.Tensor:
        return self.head.module.weight.sum() * math.nan

    monkeypatch.setattr(SFTAlignment, "__call__", broken)
    model = LlamaForCausalLM.from_pretrained("model").state_dict()
    status, out, err = finetune(full=True, safegrad={"loss": "sft"})
    assert status == 1, err
    assert "3 steps, 3 skipped; written to tuned" in out
    assert "SafeGradTrainer: all 3 steps were skipped" in err
    tuned = LlamaForCausalLM.from_pretrained("tuned").state_dict()
    assert all(torch.equal(model[name], tuned[name]) for name in model)


def test_the_cross_entropy_is_not_called_kl(finetune: Finetune) -> None:
    status, out, err = finetune(full=True, safegrad={"loss": "sft"}, output="sft")
    assert status == 0, err
    assert ", alignment loss " in out
    assert "KL" not in out


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"trian": "x"}, "run.yaml:13: unknown key 'trian', did you mean train?"),
            ({"alignment": None}, "error: --alignment is missing"),
            ({"model": [3]}, "run.yaml:1: model must be text, got [3]"),
            ({"dtype": "float8"}, "run.yaml:13: dtype must be one of float32, bfloat16, float16"),
            ({"lora": {"rank": 8}}, "run.yaml:14: lora: unknown key 'rank', expected one of"),
            ({"lora": {"r": "x"}}, "run.yaml:14: lora.r must be a whole number, got x"),
            ({"lora": {"targets": ["w"]}}, "run.yaml:14: lora.targets: Target modules {'w'} not"),
            ({"safegrad": {"rho": -1}}, "run.yaml:14: gradsafe.SafeGradConfig: expected rho"),
            ({"safegrad": {"rho": "a"}}, "run.yaml:14: safegrad.rho must be a number, got a"),
            ({"safegrad": {"roh": 1}}, "run.yaml:14: safegrad: unknown key 'roh', did you mean r"),
            ({"training": {"output_dir": "x"}}, "run.yaml:7: training.output_dir is set by --out"),
            ({"training": {"lerning_rate": 1}}, "training.lerning_rate: unknown key, did you mean"),
            ({"training": {"max_steps": 1.5}}, "run.yaml:7: training.max_steps: Expected a <class"),
            (
                {"training": {"max_steps": 1, "gradient_accumulation_steps": -2}},
                "run.yaml:8: training.gradient_accumulation_steps: gradsafe.SafeGradTrainer: exp",
            ),
            (
                {"training": {"gradient_accumulation_steps": 0}, "model": "gone"},
                "expected gradient_accumulation_steps to be at least 1, got 0",  # before loading
            ),
            ({"training": {"num_train_epochs": 0}}, "run.yaml:7: training.num_train_epochs: "),
            ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: gradsafe.Sa"),
            ({"model": "small"}, "alignment_dataset[0] (refusals.jsonl:1): expected input_ids"),
            ({"model": "broken"}, "the model's logits hold NaN or Inf"),
            ({"training": {"optim": "adamu"}}, "run.yaml:7: training.optim: adamu is not a valid"),
            ({"training": {"fsdp": True}}, "run.yaml:7: training.fsdp: fsdp needs several proc"),
            ({"train": "gone.jsonl"}, "no such file: gone.jsonl"),
            ({"alignment": "bad.jsonl"}, "bad.jsonl:2: the field 'response' is missing"),
            ({"train": "empty.jsonl"}, "empty.jsonl: no rows"),
            ({"output": "a/b"}, "cannot write a/b: no such folder a"),
            ({"output": "model"}, "model is not empty: choose --resume or another output"),
            ({"model": "gone"}, "error: --model gone: no such folder, and no such model in the"),
            ({"safegrad": {"reference": "gone"}}, "error: --model gone: no such folder"),
            ({"full": True}, "run.yaml:13: full needs safegrad.reference, a model folder"),
            (
                {"full": True, "safegrad": {"rho": 1.0, "reference": "cached"}},
                "run.yaml:13: full needs safegrad.reference, a model folder",
            ),
            (
                {"alignment": "long.jsonl"},
                "gradsafe.SafeGradTrainer: alignment_dataset[1] (long.jsonl:2)",
            ),
        ],
    )
    def test_in_one_line(self, finetune: Finetune, changes: dict[str, Any], message: str) -> None:
        if changes.get("model") in ("small", "broken"):
            for name in ("small", "broken"):
                shutil.copytree("model", name)
            model = LlamaForCausalLM.from_pretrained("model")
            model.resize_token_embeddings(40)
            model.save_pretrained("small")
            model = LlamaForCausalLM.from_pretrained("model")
            model.get_input_embeddings().weight.data.fill_(math.nan)
            model.save_pretrained("broken")
        Path("empty.jsonl").write_text("\n")
        good = json.dumps({"prompt": "a", "response": "b"})
        Path("bad.jsonl").write_text(f'{good}\n{{"prompt": "a"}}\n')
        long = json.dumps({"prompt": "a" * 80, "response": "b"})
        Path("long.jsonl").write_text(f"{good}\n{long}\n")
        status, out, err = finetune(**changes)
        assert status == 2
        assert out == ""
        assert message in err
        assert err.count("gradsafe: error:") == 1

    def test_bytes_that_are_no_text(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for data, message in (
            (b"model: caf\xe9\n", "run.yaml: not UTF-8 at byte 10"),
            (
                b"model: \x00\n",
                "run.yaml: not valid YAML: special characters are not allowed",
            ),
        ):
            Path("run.yaml").write_bytes(data)
            assert main(["finetune", "--config", "run.yaml"]) == 2
            assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train": "other.jsonl"}, "train_rows was"),
            ({"lora": {"alpha": 32}}, "adapters['default.lora_alpha'] was 16, now it is 32"),
            ({"lora": {"r": 4}}, "trainable["),
            ({"training": {"learning_rate": 0.5}}, "learning_rate was 0.01, now it is 0.5"),
            ({"training": {"per_device_train_batch_size": 4}}, "batch_size was 2, now it is 4"),
            ({"training": {"gradient_accumulation_steps": 3}}, "batch_size was 2, now it is 6"),
        ],
    )
    def test_another_run_is_not_resumed(
        self, finetune: Finetune, changes: dict[str, Any], message: str
    ) -> None:
        assert finetune()[0] == 0
        before = {p: p.read_bytes() for p in Path().rglob("tuned*/**/*") if p.is_file()}
        before[Path("tuned.config.yaml")] = Path("tuned.config.yaml").read_bytes()
        rows = Path("user.jsonl").read_text().splitlines(keepends=True)
        Path("other.jsonl").write_text("".join(rows[::-1]))
        training = {**SETTINGS["training"], "max_steps": 9, **changes.get("training", {})}
        status, out, err = finetune("--resume", **{**changes, "training": training})
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("gradsafe: error:") == 1
        assert all(path.read_bytes() == data for path, data in before.items())

    def test_nothing_to_resume(self, finetune: Finetune) -> None:
        status, _, err = finetune("--resume")
        assert status == 2
        assert "--resume: no complete checkpoint in tuned: start without --resume" in err

    def test_options_that_exclude_each_other(self, finetune: Finetune) -> None:
        _, _, err = finetune(full=True, adapter="tuned", safegrad={"loss": "sft"})
        assert "--full trains no adapters: merge --adapter into the model first" in err
        _, _, err = finetune(adapter="tuned", lora={"r": 64})
        assert "--lora is for new adapters, and --adapter adds none" in err

    def test_no_such_settings(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["finetune", "--config", "gone.yaml"]) == 2
        assert "--config gone.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", [False, "no"])
def test_yaml_reads_no_as_false(finetune: Finetune, strategy: object) -> None:
    training = {**SETTINGS["training"], "save_strategy": strategy, "max_steps": 1}
    status, _, err = finetune(training=training)
    assert status == 0, err
    assert not list(Path("tuned").glob("checkpoint-*"))


def test_rows_of_the_hub_may_have_columns_that_json_lacks(finetune: Finetune) -> None:
    row = {"prompt": "task", "response": "Yes"}
    rows = [{**row, "seen": datetime(2026, 1, day)} for day in (1, 2, 3, 4)]
    Dataset.from_list(rows).to_parquet("data/train-00000-of-00001.parquet")
    training = {**SETTINGS["training"], "max_steps": 1}
    status, _, err = finetune(train=f"hf:{Path('data').absolute()}", training=training)
    assert status == 0, err

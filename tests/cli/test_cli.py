"""The program around the commands: help, status, errors in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsafe
from gradsafe._cli import main
from gradsafe._cli.main import COMMANDS, load
from gradsafe._cli.parser import Command
from gradsafe._jobs.options import save_config


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from gradsafe._cli import main\n"
        "try: main(['detect', '--help'])\n"
        "except SystemExit: print({'torch', 'numpy', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "gradsafe", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"gradsafe {gradsafe.__version__}\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-m", "gradsafe", "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out
    assert main(["trace"]) == 2
    assert "choose one of trace build, trace query, trace repair" in capsys.readouterr().err
    assert main(["detct"]) == 2
    assert "unknown command 'detct', did you mean detect?" in capsys.readouterr().err


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsafe.doctor.run", lambda as_json: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_memory_errors_and_warnings_take_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(as_json: bool) -> int:
        import warnings

        warnings.warn("first\nsecond", stacklevel=1)
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    monkeypatch.setattr("gradsafe.doctor.run", run)
    assert main(["doctor"]) == 2
    advice = "lower --batch_tokens"
    assert capsys.readouterr().err == (
        f"gradsafe: warning: first second\ngradsafe: error: CUDA out of memory; {advice}\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name: str) -> None:
    command = Command(name, load(name))
    for action in command._parser._actions:
        if action.dest not in ("lora", "safegrad"):  # sections
            assert action.help, action.dest


def test_every_field_of_a_method_is_an_option() -> None:
    from gradsafe.detection.config import DetectorConfig
    from gradsafe.finetuning.config import SafeGradConfig
    from gradsafe.tracing.config import QueryConfig, TraceConfig

    for name, prefix, config in (
        ("detect", "", DetectorConfig),
        ("trace build", "", TraceConfig),
        ("trace query", "", QueryConfig),
        ("finetune", "safegrad.", SafeGradConfig),
    ):
        known = {action.dest for action in Command(name, load(name))._parser._actions}
        assert known >= {prefix + field for field in config.__dataclass_fields__}


class TestYaml:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def parse(self, text: str, *options: str, name: str = "detect") -> Any:
        Path("run.yaml").write_text(text)
        return Command(name, load(name)).parse(["--config", "run.yaml", *options])

    def test_options_override_the_file(self) -> None:
        text = "prompts: p\nmodel: m\nmethod: nll\nlayers: [1, 2]\nmax_fpr: 5e-2\n"
        config = self.parse(text, "--method", "gradnorm", "--no-progress", "-o", "out")
        assert (config.prompts, config.model.model, config.output) == ("p", "m", "out")
        assert (config.config.method, config.config.layers) == ("gradnorm", (1, 2))
        assert config.fit.max_fpr == 0.05
        assert config.progress is False
        assert self.parse(text, "q").prompts == "q"

    def test_sections(self) -> None:
        text = "lora:\n  r: 4\nsafegrad:\n  rho: 0.5\ntraining:\n  learning_rate: 1e-5\n"
        config = self.parse(text, "--lora.alpha", "2", "--training.optim", "sgd", name="finetune")
        assert (config.lora.r, config.lora.alpha, config.safegrad.rho) == (4, 2, 0.5)
        assert config.training == {"learning_rate": 1e-5, "optim": "sgd"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("model: m\nmehod: nll\n", "run.yaml:2: unknown key 'mehod', did you mean method?"),
            ("lora: {}\n", "run.yaml:1: unknown key 'lora', expected one of"),
            ("\nmethod: magic\n", "run.yaml:2: method must be one of gradcoo, gradsafe, cascade"),
            ("layers: many\n", "run.yaml:1: layers must be a whole number or a list of whole"),
            ("model: m\nrow_fraction: 3\n", "run.yaml:2: gradsafe.Detector: expected 0 < row_fr"),
            ("unsigned: 2\n", "run.yaml:1: unsigned must be true or false, got 2"),
            ("model: [", "run.yaml:1: not valid YAML"),
            ("- model", "run.yaml:1: expected keys and values"),
            ("\n", "run.yaml:1: expected keys and values"),
            ("model: a\nmodel: b\n", "run.yaml:2: 'model' is given twice, first in line 1"),
        ],
    )
    def test_what_is_wrong_is_named_with_its_line(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            self.parse(text)

    def test_a_saved_configuration_gives_the_same_one(self) -> None:
        text = "prompts: p\nmodel: m\nmethod: nll\nlayers: [1, 2]\nresponse: 'Of course: yes'\n"
        config = self.parse(text, "--template", "{prompt} #")
        save_config(config, "out.jsonl")
        again = Command("detect", load("detect")).parse(["--config", "out.jsonl.config.yaml"])
        assert again == config

    def test_no_such_file(self) -> None:
        with pytest.raises(ValueError, match=r"^--config gone\.yaml: no such file"):
            Command("detect", load("detect")).parse(["--config", "gone.yaml"])

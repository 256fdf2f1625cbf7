"""The program around the commands: help, status, errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest
import torch

import gradsafe
from gradsafe._cli import main, options
from gradsafe.detection import config


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
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


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
    advice = "lower --batch-tokens"
    assert capsys.readouterr().err == (
        f"gradsafe: warning: first second\ngradsafe: error: CUDA out of memory; {advice}\n"
    )


def test_choices_are_the_detector_s() -> None:
    assert get_args(config.Method) == options.METHODS
    assert get_args(config.Granularity) == options.GRANULARITIES
    assert get_args(config.Relative) == options.RELATIVES
    assert tuple(config.REFERENCE_DTYPES) == options.REFERENCE_DTYPES
    fields = set(config.DetectorConfig.__dataclass_fields__)
    assert set(options.FIT_OPTIONS) <= fields
    baselines = {m for m in options.METHODS if not config.DetectorConfig(m).uses_references}
    assert set(options.WITHOUT_REFERENCES) == baselines

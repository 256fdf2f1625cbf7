"""`gradsafe trace build` under torchrun: the index of one process, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from several import messages, one_thread, torchrun

from gradsafe._cli import main

pytestmark = pytest.mark.slow

ROWS = [{"prompt": "why " * (i % 5) + f"{i}", "response": f"so {i * i}"} for i in range(41)]
FATAL = "rows.jsonl:27"  # in the fourth shard of six


@pytest.fixture(scope="module")
def command(model: Path) -> list[str]:
    options = ["--layer", "auto", "--shard-samples", "7", "--batch-tokens", "90"]
    return ["trace", "build", "--model", str(model), "--device", "cpu", *options, "rows.jsonl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, command: list[str]) -> Path:
    """The samples, and `whole`, an index built by one process."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.chdir(folder)
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        assert main([*command, "--index", "whole"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def files(path: str) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in Path(path).iterdir()}


def failing(how: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    script = str(Path(__file__).with_name("failing_gradsafe.py"))
    return torchrun(2, script, how, FATAL, *command, "--index", "index")


def test_two_write_the_index_of_one(command: list[str]) -> None:
    done = torchrun(2, "-m", "gradsafe", *command, "--index", "index")
    assert done.returncode == 0, done.stderr
    assert len(files("whole")) == 7
    assert files("index") == files("whole")
    assert done.stdout == "41 samples at layer 2 in index\n"
    assert messages(done) == []


def test_a_killed_process_ends_all_and_one_alone_goes_on(command: list[str]) -> None:
    done = failing("kill", command)
    assert done.returncode != 0
    assert not Path("index/shard-000003.safetensors").exists()
    assert list(Path("index").glob("shard-*"))
    with one_thread():
        assert main([*command, "--index", "index"]) == 0
    assert files("index") == files("whole")


def test_after_an_error_three_go_on(command: list[str]) -> None:
    done = failing("error", command)
    assert done.returncode != 0
    assert messages(done) == ["gradsafe: error: the gradient holds NaN"]
    assert "gradsafe/cli" not in done.stderr  # no traceback of ours
    assert not Path("index/shard-000003.safetensors").exists()
    done = torchrun(3, "-m", "gradsafe", *command, "--index", "index")
    assert done.returncode == 0, done.stderr
    assert files("index") == files("whole")


def test_after_an_interruption_two_go_on(command: list[str]) -> None:
    done = failing("interrupt", command)
    assert done.returncode != 0
    said = [line for line in messages(done) if "interrupted" in line]
    assert said == ["gradsafe: interrupted: run the same command to continue"]
    done = torchrun(2, "-m", "gradsafe", *command, "--index", "index")
    assert done.returncode == 0, done.stderr
    assert files("index") == files("whole")

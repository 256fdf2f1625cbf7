"""`gradsafe detect` under torchrun: the file of one process, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from several import messages, one_thread, torchrun
from tiny_model import BENIGN, SAFE, UNSAFE

from gradsafe._cli import main
from gradsafe._io.records import part_paths

# A random model refuses nothing, which every fit warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning"),
    pytest.mark.slow,
]

PROMPTS = [f"number {i} " + "x" * (i * 7 % 30) for i in range(270)]  # five slices, the last short
FATAL = 140  # in the third slice: the processes have scored something by then


@pytest.fixture(scope="module")
def common(model: Path) -> list[str]:
    return [
        *("detect", "--model", str(model), "--device", "cpu", "--unsafe", "unsafe.txt"),
        *("--safe", "safe.txt", "--calibrate", "benign.txt", "many.jsonl"),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> Path:
    """Input files and whole.jsonl, written by one process."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = [{"prompt": p, "label": i % 2} for i, p in enumerate(PROMPTS)]
        Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, texts in (("unsafe", UNSAFE), ("safe", SAFE), ("benign", BENIGN)):
            Path(f"{name}.txt").write_text("\n".join(texts))
        with one_thread():
            assert main([*common, "-o", "whole.jsonl", "--no-progress"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def failing(how: str, common: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    script = str(Path(__file__).with_name("failing_gradsafe.py"))
    return torchrun(2, script, how, f"many.jsonl:{FATAL + 1}", *common, "-o", "out.jsonl", *options)


def same_as_whole() -> bool:
    return Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def complete_slices() -> int:
    assert part_paths("out.jsonl")
    return sum(part.read_bytes().count(b"\n") // 64 for part in part_paths("out.jsonl"))


def test_two_write_the_file_of_one(common: list[str]) -> None:
    done = torchrun(2, "-m", "gradsafe", *common, "-o", "out.jsonl", "--save-detector", "saved")
    assert done.returncode == 0, done.stderr
    assert same_as_whole()
    assert done.stdout.count("gradcoo") == 1
    for once in ("too few to guarantee", "scored 14 weights", "calibrated: threshold"):
        assert sum(once in line for line in messages(done)) == 1
    assert len(messages(done)) == 3
    assert Path("saved/manifest.json").is_file()
    assert not part_paths("out.jsonl")


def test_a_killed_process_ends_all_and_one_alone_goes_on(common: list[str]) -> None:
    done = failing("kill", common)
    assert done.returncode != 0
    assert complete_slices() >= 1
    assert main([*common, "-o", "out.jsonl"]) == 2  # neither resume nor overwrite
    with one_thread():
        assert main([*common, "-o", "out.jsonl", "--resume"]) == 0
    assert same_as_whole()
    assert not part_paths("out.jsonl")


def test_after_an_interruption_three_go_on(common: list[str]) -> None:
    done = failing("interrupt", common)
    assert done.returncode != 0
    hint = "records are in out.jsonl.part-*; run the same command with"
    assert [hint in line for line in messages(done) if "interrupted" in line] == [True]
    assert complete_slices() >= 1
    # As if one process had begun, and been killed in the middle of a slice and of a line.
    Path("out.jsonl").write_bytes(Path("whole.jsonl").read_bytes()[:12345])
    done = torchrun(3, "-m", "gradsafe", *common, "-o", "out.jsonl", "--resume")
    assert done.returncode == 0, done.stderr
    assert same_as_whole()
    assert not part_paths("out.jsonl")


def test_a_prompt_that_fails_ends_all_with_one_message(common: list[str]) -> None:
    Path("out.jsonl").write_text("old")
    done = failing("error", common, "--overwrite")
    assert done.returncode != 0
    errors = [line for line in messages(done) if "error" in line]
    assert errors == [f"gradsafe: error: many.jsonl:{FATAL + 1}: the gradient holds NaN"]
    assert (
        sum("--resume in place of --overwrite to continue" in line for line in messages(done)) == 1
    )
    assert "gradsafe/cli" not in done.stderr  # no traceback of ours
    kept = b"".join(part.read_bytes() for part in part_paths("out.jsonl"))
    assert kept.count(b'"index": 139,') == 1
    assert b'"index": 140,' not in kept
    assert complete_slices() >= 1

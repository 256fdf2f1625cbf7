"""The tiny model on disk, a working folder with input files, and the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_model import BENIGN, PROMPTS, SAFE, UNSAFE, Run, build

from gradsafe._cli import main


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all input files."""
    monkeypatch.chdir(tmp_path)
    labels = ["unsafe" if i % 2 else "safe" for i in range(len(PROMPTS))]
    rows = [
        {"prompt": prompt, "label": label, "source_id": f"s-{i}", "other": "dropped"}
        for i, (prompt, label) in enumerate(zip(PROMPTS, labels, strict=True))
    ]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, texts in (("unsafe", UNSAFE), ("safe", SAFE), ("benign", BENIGN)):
        Path(f"{name}.txt").write_text("\n".join(texts))
    return tmp_path


@pytest.fixture
def detect(model: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `gradsafe detect` on the tiny model; returns status, stdout and stderr."""

    def call(
        *options: str, prompts: str = "prompts.jsonl", references: bool = True
    ) -> tuple[int, str, str]:
        fixed = ["--unsafe", "unsafe.txt", "--safe", "safe.txt"] if references else []
        status = main(
            ["detect", "--model", str(model), "--device", "cpu", *fixed, *options, prompts]
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call

"""`gradsafe screen`: what it writes, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from several import one_thread, torchrun
from tiny_model import Run, records
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import gradsafe
from gradsafe import Screener
from gradsafe._cli import main
from gradsafe._io.slices import Slices

ROWS: list[dict[str, Any]] = [
    {"prompt": f"SECRET {i}", "response": "yes " + "x" * (i % 5)} for i in range(20)
]
ROWS[3] = {"messages": [
    {"role": "user", "content": "SECRET talk"}, {"role": "assistant", "content": "well"}
]}  # fmt: skip
ROWS[4] = {"prompt": "SECRET 4", "completion": "done", "id": "four"}
UNSAFE = [{"prompt": "break it", "response": "take a bar"}, {"prompt": "steal", "response": "ok"}]
SAFE = [{"prompt": "bake a cake", "response": "mix it"}, {"prompt": "sing", "response": "la"}]
ALIGNMENT = [{"prompt": "hurt him", "response": "I cannot"}]
CLEAN = [{"prompt": f"what is {i}", "response": f"it is {i}"} for i in range(12)]
FILES = {"rows": ROWS, "unsafe": UNSAFE, "safe": SAFE, "alignment": ALIGNMENT, "clean": CLEAN}
REFERENCES = ("--unsafe", "unsafe.jsonl", "--safe", "safe.jsonl", "--alignment", "alignment.jsonl")
CALIBRATION = ("--calibrate", "clean.jsonl", "--max-fpr", "0.2")


def save(name: str, rows: list[dict[str, Any]]) -> None:
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def inputs(place: Path) -> None:
    for name, rows in FILES.items():
        save(name, rows)


@pytest.fixture
def screen(model: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `gradsafe screen`; returns status, stdout and stderr."""

    def call(*options: str, references: bool = True) -> tuple[int, str, str]:
        fixed = REFERENCES if references else ()
        status = main(
            [*("screen", "--model", str(model), "--device", "cpu", "-o", "out"), *fixed, *options]
            + ([] if any(option.endswith("rows.jsonl") for option in options) else ["rows.jsonl"])
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def expected(model: Path) -> Any:
    loaded = LlamaForCausalLM.from_pretrained(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    screener = Screener.fit(loaded, tokenizer, UNSAFE, SAFE, ALIGNMENT, progress=False)
    screener.calibrate(CLEAN, 0.2, progress=False)
    return screener.score(ROWS, progress=False)


def test_writes_scores_kept_and_flagged_rows_and_a_report(screen: Run, model: Path) -> None:
    lines = Path("rows.jsonl").read_bytes().splitlines(keepends=True)
    lines.insert(5, b"\n")
    Path("rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines).rstrip(b"\n"))
    status, out, err = screen(*CALIBRATION)
    assert status == 0, err
    scores, found = expected(model), records("out/scores.jsonl")
    for name in ("alignment", "share", "nll"):
        want = getattr(scores, name).tolist()
        assert [record[name] for record in found] == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert [r["line"] for r in found] == [1, 2, 3, 4, 5, *range(7, 22)]  # line 6 is blank
    assert [record["flag"] for record in found] == scores.flags.tolist()
    rows = {flag: [r for r, own in zip(ROWS, found, strict=True) if own["flag"] is flag]
            for flag in (True, False)}  # fmt: skip
    assert records("out/flagged.jsonl") == rows[True]
    assert records("out/kept.jsonl") == rows[False]
    kept = Path("out/kept.jsonl").read_bytes() + Path("out/flagged.jsonl").read_bytes()
    assert sorted(kept.splitlines()) == sorted(line.strip() for line in lines if line.strip())
    assert f"{len(rows[True])} of 20 rows flagged" in out
    page = Path("out/report.html").read_text()
    assert "<svg" in page
    assert "SECRET" not in page + out + err
    assert Path("out/screen.config.yaml").exists()


def test_texts_appear_only_on_request(screen: Run) -> None:
    assert screen("--show-text", "--top", "2")[0] == 0
    page = Path("out/report.html").read_text()
    assert "S</span>" in page
    assert page.count("Line ") == 2


def test_without_clean_rows_there_are_no_flags(screen: Run) -> None:
    status, out, _ = screen()
    assert status == 0
    assert "no threshold, so no flags" in out
    assert "flag" not in records("out/scores.jsonl")[0]
    assert not Path("out/kept.jsonl").exists()


def test_one_kind_of_reference_is_enough(screen: Run) -> None:
    status, out, _ = screen("--alignment", "alignment.jsonl", references=False)
    assert status == 0
    assert "share" not in records("out/scores.jsonl")[0]
    assert "alignment (decides)" in out


def test_an_interrupted_run_goes_on(screen: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsafe._jobs.screen.SLICE", 4)
    screen(*CALIBRATION)
    whole = Path("out/scores.jsonl").read_bytes()
    Path("out").rename("whole")
    score = Screener.score

    def failing(self: Screener, rows: Any, *options: Any) -> Any:
        if "rows.jsonl:14" in rows.names:
            raise KeyboardInterrupt
        return score(self, rows, *options)

    with monkeypatch.context() as patch:
        patch.setattr(Screener, "score", failing)
        status, _, err = screen(*CALIBRATION)
    assert status == 130
    assert "3 of 8 slices of 4 rows are in" in err
    assert "with --resume to continue" in err
    status, _, err = screen(*CALIBRATION)
    assert status == 2
    assert "was left by an interrupted run: choose resume, overwrite" in err
    status, _, err = screen(*CALIBRATION, "--resume", "--safety", "refusals")
    assert status == 2
    assert "had other prompts or settings" in err
    assert screen(*CALIBRATION, "--resume")[0] == 0
    assert Path("out/scores.jsonl").read_bytes() == whole


def test_a_killed_run_goes_on(screen: Run, model: Path) -> None:
    save("rows", [{"prompt": f"number {i}", "response": "y" * (i % 7 + 1)} for i in range(450)])
    command = [sys.executable, "-m", "gradsafe", "screen", "--model", str(model)]
    command += ["--device", "cpu", "-o", "out", *REFERENCES, "rows.jsonl"]
    home = str(Path(gradsafe.__file__).parents[1])
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": home}, stderr=subprocess.DEVNULL
    )
    part = Path("out/slices.jsonl.part-0-of-1")
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists()
    assert 0 < part.read_bytes().count(b"\n") < 8
    assert screen("--resume")[0] == 0
    resumed = records("out/scores.jsonl")
    assert screen("--overwrite")[0] == 0
    assert [r["line"] for r in resumed] == list(range(1, 451))
    for a, b in zip(resumed, records("out/scores.jsonl"), strict=True):
        assert a["alignment"] == pytest.approx(b["alignment"], rel=1e-5, abs=1e-7)


def test_another_cut_needs_no_new_scores(
    screen: Run, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    screen(*CALIBRATION)
    calls: list[int] = []
    score = Screener.score
    monkeypatch.setattr(Screener, "score", lambda self, *a: calls.append(1) or score(self, *a))
    status, out, _ = screen("--calibrate", "clean.jsonl", "--max-fpr", "0.5", "--resume")
    assert status == 0
    assert calls == []
    assert "rows flagged" in out
    status, out, _ = screen(*CALIBRATION, "--decide", "alignment", "--resume")
    assert status == 0
    assert "alignment (decides)" in out


def test_rows_are_read_slice_by_slice(screen: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Slices.read
    monkeypatch.setattr("gradsafe._jobs.screen.SLICE", 6)
    monkeypatch.setattr(Slices, "read", lambda self, n: read.append(n) or original(self, n))
    most: list[int] = []
    encode = Screener.encode
    monkeypatch.setattr(
        Screener, "encode", lambda self, rows, *a: most.append(len(rows)) or encode(self, rows, *a)
    )
    assert screen("--top", "0")[0] == 0
    assert read == [0, 1, 2, 3]
    assert most == [6, 6, 6, 2]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("rows", {"prompt": "x"}, "rows.jsonl:21: the field 'response' is missing"),
        ("rows", {"prompt": "x", "response": ""}, "rows.jsonl:21: the field 'response' is empty"),
        ("rows", {"prompt": 3, "response": "y"}, "rows.jsonl:21: the field 'prompt' must be text"),
        ("rows", ALIGNMENT[0], "rows.jsonl:21: this row is also the alignment row alignment.jsonl"),
        ("clean", SAFE[1], "clean.jsonl:13: this row is also the safe row safe.jsonl:2"),
        ("unsafe", {"prompt": "x"}, "unsafe.jsonl:3: the field 'response' is missing"),
    ],
)
def test_wrong_rows_are_named_before_the_work(
    screen: Run, name: str, row: dict[str, Any], message: str
) -> None:
    save(name, [*FILES[name], row])
    status, _, err = screen(*CALIBRATION)
    assert status == 2
    assert message in err
    assert not Path("out").exists()


def test_a_row_beyond_the_context_is_named_and_can_be_cut(screen: Run) -> None:
    save("rows", [*ROWS, {"prompt": "x", "response": "SECRET " * 20}])
    status, _, err = screen()
    assert status == 2
    assert "rows.jsonl:21: gradsafe.Screener: the row takes" in err
    assert "SECRET" not in err
    assert screen("--overwrite", "--overflow", "truncate")[0] == 0
    assert [r["truncated"] for r in records("out/scores.jsonl")] == [False] * 20 + [True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--unsafe", "unsafe.jsonl"), "--unsafe and --safe belong together"),
        ((), "--alignment FILE (unsafe prompts with refusals)"),
        (("--alignment", "none.jsonl"), "no such file: none.jsonl"),
        (("--alignment", "alignment.jsonl", "--max-fpr", "1"), "--max_fpr must be between"),
        (("--alignment", "alignment.jsonl", "--top", "-1"), "--top must be at least 0"),
        (("--alignment", "alignment.jsonl", "-o", "no/where"), "no such folder no"),
        (("--alignment", "alignment.jsonl", "-o", "safe.jsonl"), "it is not a folder"),
        (("--alignment", "alignment.jsonl", "--calibrate", "hf:x"), "save the data set as JSON"),
        (("--alignment", "alignment.jsonl", "--parameters", "lora"), "LoRA adapters"),
    ],
)
def test_wrong_options_are_named(screen: Run, options: tuple[str, ...], message: str) -> None:
    status, _, err = screen(*options, references=False)
    assert status == 2
    assert message in err


def test_inputs_are_not_overwritten(screen: Run) -> None:
    Path("out").mkdir()
    Path("rows.jsonl").rename("out/kept.jsonl")
    Path("rows.jsonl").symlink_to("out/kept.jsonl")
    before = Path("out/kept.jsonl").read_bytes()
    status, _, err = screen(*CALIBRATION, "--overwrite")
    assert status == 2
    assert "is one of the input files" in err
    assert Path("out/kept.jsonl").read_bytes() == before


def test_a_file_that_changes_is_refused(screen: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Screener.fit.__func__  # type: ignore[attr-defined]

    def changing(cls: type, *args: Any, **options: Any) -> Screener:
        save("rows", [*ROWS[1:], ROWS[0]])
        return fit(cls, *args, **options)

    monkeypatch.setattr(Screener, "fit", classmethod(changing))
    status, _, err = screen()
    assert status == 2
    assert "rows.jsonl: the file changed" in err


def test_scale_adam_takes_a_sample_of_the_rows(
    screen: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsafe._jobs.screen.SLICE", 4)
    assert screen("--scale", "adam")[0] == 0
    first = [r["alignment"] for r in records("out/scores.jsonl")]
    save("rows", [*ROWS, *ROWS])  # the first slices are the same, and the sample is not
    status, _, err = screen("--scale", "adam", "--resume")
    assert status == 2
    assert "had other prompts or settings" in err
    save("rows", ROWS)
    assert screen("--overwrite")[0] == 0
    assert first != [r["alignment"] for r in records("out/scores.jsonl")]
    assert torch.tensor(first).isfinite().all()


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(screen: Run, model: Path) -> None:
    save("rows", [{"prompt": f"number {i}", "response": "y" * (i % 7 + 1)} for i in range(270)])
    with one_thread():
        assert screen(*CALIBRATION)[0] == 0
    Path("out").rename("one")
    common = ("screen", "--model", str(model), "--device", "cpu", "-o", "out")
    done = torchrun(2, "-m", "gradsafe", *common, *REFERENCES, *CALIBRATION, "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows flagged") == 1
    for name in ("slices", "scores", "kept", "flagged"):
        path = f"{name}.jsonl"
        assert Path("out", path).read_bytes() == Path("one", path).read_bytes()

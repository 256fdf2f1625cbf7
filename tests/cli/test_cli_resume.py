"""An interrupted `gradsafe detect` goes on where it stopped, and never mixes two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_model import PROMPTS, Run, records

from gradsafe import Detector
from gradsafe._io.records import part_paths


def fail_at(monkeypatch: pytest.MonkeyPatch, prompt: str, error: BaseException) -> None:
    """Makes the detector raise as soon as it meets a prompt."""
    score = Detector.score

    def failing(self: Detector, prompts: Any, *args: Any, **options: Any) -> Any:
        if f"prompts.jsonl:{PROMPTS.index(prompt) + 1}" in prompts.names:
            raise error
        return score(self, prompts, *args, **options)

    monkeypatch.setattr(Detector, "score", failing)


def test_an_interrupted_run_goes_on(detect: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsafe._jobs.detect.SLICE", 3)
    detect("-o", "whole.jsonl")
    with monkeypatch.context() as patch:
        fail_at(patch, PROMPTS[7], KeyboardInterrupt())
        status, out, err = detect("-o", "out.jsonl")
    assert status == 130
    assert out == ""
    assert err.endswith(
        "gradsafe: interrupted: 6 of 10 records are in out.jsonl.part-*; run the same command with "
        "--resume to continue\n"
    )
    (part,) = part_paths("out.jsonl")
    assert len(records(str(part))) == 6
    with part.open("a") as file:
        file.write('{"index": 6, "prom')
    status, out, _ = detect("-o", "out.jsonl", "--resume")
    assert status == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert out.split()[out.split().index("gradcoo") + 1] == "10"


def test_a_slice_cut_short_is_scored_as_a_whole(
    detect: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsafe._jobs.detect.SLICE", 4)
    detect("-o", "out.jsonl")
    whole = Path("out.jsonl").read_bytes()
    scored = []
    score = Detector.score

    def watched(self: Detector, prompts: Any, *args: Any, **options: Any) -> Any:
        scored.append(len(prompts))
        return score(self, prompts, *args, **options)

    monkeypatch.setattr(Detector, "score", watched)
    lines = whole.splitlines(keepends=True)
    Path("out.jsonl").write_bytes(b"".join(lines[:6]))
    assert detect("-o", "out.jsonl", "--resume")[0] == 0
    assert scored == [4, 2]
    assert Path("out.jsonl").read_bytes() == whole


def test_parts_left_by_several_processes_are_used_or_overwritten(detect: Run) -> None:
    detect("-o", "whole.jsonl")
    whole = Path("whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    part = Path("out.jsonl.part-1-of-2")
    for option in ("--resume", "--overwrite"):
        part.write_bytes(b"".join(lines[3:]) + lines[0][:9])
        Path("out.jsonl").unlink(missing_ok=True)
        status, _, err = detect("-o", "out.jsonl")
        assert status == 2
        assert "out.jsonl.part-1-of-2 was left by an interrupted run" in err
        assert detect("-o", "out.jsonl", option)[0] == 0
        assert Path("out.jsonl").read_bytes() == whole
        assert not part.exists()
    part.write_bytes(b"".join(lines[3:]))
    Path("out.jsonl").unlink()
    status, _, err = detect("-o", "out.jsonl", "--resume", "--method", "nll")
    assert status == 2
    assert "out.jsonl.part-1-of-2:1: run is" in err
    assert part.read_bytes() == b"".join(lines[3:])


def test_a_complete_file_stays_as_it_is(detect: Run) -> None:
    _, first, _ = detect("-o", "out.jsonl", "--calibrate", "benign.txt")
    before = Path("out.jsonl").read_bytes()
    _, second, _ = detect("-o", "out.jsonl", "--calibrate", "benign.txt", "--resume")
    assert Path("out.jsonl").read_bytes() == before
    assert first == second


def test_more_prompts_may_follow(detect: Run) -> None:
    detect("-o", "out.jsonl", "--limit", "4")
    assert detect("-o", "out.jsonl", "--resume")[0] == 0
    assert len(records()) == len(PROMPTS)


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "nll"),
        ("--response", "Yes"),
        ("--calibrate", "benign.txt"),
        ("--dtype", "bfloat16"),
        ("--safe", "benign.txt"),
        ("--show_text", "true"),
    ],
)
def test_other_settings_are_refused(detect: Run, options: tuple[str, ...]) -> None:
    detect("-o", "out.jsonl", "--limit", "4")
    before = Path("out.jsonl").read_bytes()
    status, _, err = detect("-o", "out.jsonl", "--resume", *options)
    assert status == 2
    assert "out.jsonl:1: run is" in err
    assert "had other prompts or settings" in err
    assert Path("out.jsonl").read_bytes() == before


def test_other_prompts_are_refused(detect: Run) -> None:
    detect("-o", "out.jsonl", "--limit", "4")
    lines = Path("prompts.jsonl").read_text().splitlines()
    Path("prompts.jsonl").write_text("\n".join(lines[1:]))
    assert "out.jsonl:1: prompt_sha256 is" in detect("-o", "out.jsonl", "--resume")[2]


def test_batching_may_change(detect: Run) -> None:
    detect("-o", "out.jsonl", "--limit", "4")
    assert detect("-o", "out.jsonl", "--resume", "--batch-tokens", "64")[0] == 0


def test_a_prompt_that_fails_is_named_and_those_before_it_are_kept(
    detect: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, PROMPTS[5], ValueError("the gradient holds NaN"))
    status, _, err = detect("-o", "out.jsonl")
    assert status == 2
    assert "gradsafe: error: prompts.jsonl:6: the gradient holds NaN" in err
    assert "5 of 10 records are in out.jsonl.part-*" in err
    (part,) = part_paths("out.jsonl")
    assert len(records(str(part))) == 5


def test_overwriting_spares_the_old_file_until_there_is_a_new_score(
    detect: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out.jsonl").write_text("old")
    with monkeypatch.context() as patch:
        fail_at(patch, PROMPTS[0], KeyboardInterrupt())
        assert detect("-o", "out.jsonl", "--overwrite")[0] == 130
    assert Path("out.jsonl").read_text() == "old"
    detect("-o", "out.jsonl", "--overwrite")
    assert len(records()) == len(PROMPTS)

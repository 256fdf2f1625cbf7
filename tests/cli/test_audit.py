"""`gradsafe audit` on the testbed: the whole chain, interruptions, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from benchmarks import audit
from benchmarks.experiments import ROOT
from gradsafe._cli import main

ROWS = 120
# Without the alignment gradient, so that the harmful rows have their effect.
UNPROTECTED = {
    "skip": ["screen"],
    "safegrad": {"projection": False, "rho": 0.0},
    "training": {**audit.settings(ROWS)["training"], "num_train_epochs": 5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("audit")
    audit.prepare(made, ROWS, **UNPROTECTED)
    return made


@pytest.fixture
def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(folder)

    def call(*options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["audit", "--config", "audit.yaml", *options])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def done(folder: Path) -> dict:
    """The report of an audit that was not interrupted."""
    status = command(folder, "whole").wait()
    assert status in (0, 1)
    return report(folder / "whole")


def command(folder: Path, output: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "gradsafe", "audit", "--config", "audit.yaml",
         "--output", output],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def report(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())


def numbers(found: dict) -> dict:
    """What must not depend on interruptions."""
    stages = {
        name: {key: value for key, value in facts.items() if key not in ("seconds", "cosines")}
        for name, facts in found["stages"].items()
    }
    return {"verdict": found["verdict"], "stages": stages}


def test_harm_is_found_traced_and_repaired(done: dict) -> None:
    stages = done["stages"]
    assert list(stages) == ["before", "finetune", "after", "trace", "repair", "repaired"]
    rates = [
        stages[name]["unsafe answered"] / stages[name]["unsafe prompts"]
        for name in ("before", "after", "repaired")
    ]
    assert rates[0] <= 0.2
    assert rates[1] >= 0.8
    assert rates[2] <= rates[1] / 2
    check = done["verdict"]["checks"][0]
    assert (check["before"], check["after"]) == (rates[0], rates[2])
    assert check["interval"][0] <= rates[2] <= check["interval"][1]
    assert check["passed"] == (rates[2] <= check["allowed"])
    assert done["settings"]["files"].keys() == {"train", "alignment", "unsafe", "safe", "clean"}
    assert stages["repair"]["rows"] == ROWS
    prints = {stages[name]["model"] for name in ("before", "after", "repaired")}
    assert len(prints) == 3


def test_most_of_the_dropped_rows_are_the_planted_ones(done: dict, folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    harmful = {row["id"] for row in map(json.loads, lines) if "Kind" not in row["response"]}
    dropped = done["stages"]["repair"]["dropped"]
    assert len(dropped) == len(harmful) == ROWS // 4
    assert len(harmful & set(dropped)) >= 0.7 * len(dropped)


def test_a_second_call_does_nothing_and_says_the_same(done: dict, run, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "whole").glob("*.json")}
    status, out, err = run("--output", "whole")
    assert status == (0 if done["verdict"]["passed"] else 1)
    assert "..." not in err
    rewritten = {folder / "whole" / "report.json"}
    for path, when in before.items():
        assert (path.stat().st_mtime_ns == when) or path in rewritten
    assert numbers(report(folder / "whole")) == numbers(done)
    assert re.search(r"unsafe prompts answered +[\d.]+ %", out)


@pytest.mark.parametrize("moment", ["finetune/checkpoint-10", "repair"])
def test_a_kill_changes_nothing(moment: str, done: dict, folder: Path) -> None:
    output = folder / f"killed {moment.replace('/', ' ')}"
    process = command(folder, output.name)
    end = time.monotonic() + 300
    while not (output / moment).exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "report.json").exists()
    assert command(folder, output.name).wait() in (0, 1)
    assert numbers(report(output)) == numbers(done)


def test_the_page_holds_the_numbers_and_no_texts(done: dict, run, folder: Path) -> None:
    run("--output", "whole")
    page = (folder / "whole" / "report.html").read_text()
    assert "Audit of a fine-tuning" in page
    rate = 100 * done["verdict"]["checks"][0]["after"]
    assert f"{rate:.1f} %" in page
    assert done["stages"]["after"]["model"] in page
    for row in map(json.loads, (folder / "unsafe.jsonl").read_text().splitlines()):
        assert row["prompt"] not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", ""), "--train is missing"),
        (("--skip", "[]", "--clean", "null"), "--clean FILE is missing"),
        (("--max_increase", "1"), "--max_increase must be from 0 to below 1"),
        (("--refusals", "[]"), "--refusals: give at least one phrase"),
        (("--queries", "0"), "--queries must be at least 1"),
        (("--adapter", "x"), "merge it into the model first"),
        (("--output", "model"), "model is not empty: choose another output"),
        (("--output", "no/such"), "no such folder"),
        (("--output", "train.jsonl"), "is not a folder"),
        (("--unsafe", "gone.jsonl"), "gone.jsonl"),
        (("--training", "{learning_rat: 1}"), "training.learning_rat: unknown key"),
    ],
)
def test_refusals(options: tuple[str, ...], message: str, run) -> None:
    status, _, err = run(*options)
    assert status == 2
    assert message in err


def test_screening_leaves_out_planted_rows(run, folder: Path) -> None:
    training = json.dumps({**audit.settings(ROWS)["training"], "max_steps": 2})
    run("--skip", "[]", "--output", "screened", "--training", training)
    found = report(folder / "screened")["stages"]["screen"]
    rows = (folder / "train.jsonl").read_bytes().splitlines()
    kept = Path(found["kept"]).read_bytes().splitlines()
    assert (found["rows"], len(kept)) == (ROWS, ROWS - found["flagged"])
    left_out = [json.loads(row) for row in rows if row not in set(kept)]
    planted = sum("Kind" not in row["response"] for row in left_out)
    assert planted >= 0.8 * ROWS // 4
    assert len(left_out) - planted <= 0.15 * ROWS


def test_other_settings_for_the_same_folder_are_refused(done: dict, run, folder: Path) -> None:
    status, _, err = run("--output", "whole", "--answer_tokens", "9")
    assert (status, "answer_tokens differs from" in err) == (2, True)
    path = folder / "clean.jsonl"
    text = path.read_text()
    path.write_text(text + text.splitlines()[0] + "\n")
    try:
        status, _, err = run("--output", "whole")
    finally:
        path.write_text(text)
    assert (status, "files.clean differs from" in err) == (2, True)


def test_the_example_has_every_option_it_needs(folder: Path) -> None:
    found = yaml.safe_load((folder / "audit.yaml").read_text())
    assert set(audit.settings(ROWS)) <= set(found)

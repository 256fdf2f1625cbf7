"""`gradsafe calibrate` and what `gradsafe serve` refuses in one line."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import testbed
from gradsafe import Detector
from gradsafe._cli import main
from gradsafe._io.artifacts import MANIFEST, read_manifest, write_manifest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="part of the extra `serve`")


@pytest.fixture
def saved(detector_folder: Path, tmp_path: Path) -> Path:
    """A copy of the detector that a test may change."""
    return Path(shutil.copytree(detector_folder, tmp_path / "detector"))


@pytest.fixture
def run(model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a command; the server itself is not started."""
    monkeypatch.delenv("GRADSAFE_API_KEYS", raising=False)
    monkeypatch.setattr("gradsafe.serving.server.run", lambda *_, **__: None)

    def call(name: str, *options: str, model: Path = model_folder) -> tuple[int, str, str]:
        status = main([name, "--model", str(model), "--device", "cpu", *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def change_calibration(folder: Path, **changes: object) -> None:
    """Writes the manifest of a detector anew, as another run of gradsafe would have."""
    manifest = read_manifest(folder)
    metadata = manifest["metadata"]
    for name, value in changes.items():
        if name == "calibration":
            metadata["calibration"] = value
        else:
            metadata["calibration"]["facts"][name] = value
    write_manifest(folder, "detector", metadata, manifest["files"])


def benign(place: Path, count: int = 60) -> str:
    rows = [{"prompt": prompt} for prompt in testbed.calibration_prompts()[200 : 200 + count]]
    file = place / "benign.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_stale_detector_is_refused_and_calibrate_renews_it(
    run, saved: Path, tmp_path: Path
) -> None:
    change_calibration(saved, transformers="4.0.0")
    status, _, err = run("serve", "--detector", str(saved), "--port", "0")
    assert status == 2
    assert "transformers (calibrated 4.0.0, now " in err
    assert f"gradsafe calibrate --detector {saved} --model " in err
    before = read_manifest(saved)["metadata"]["calibration"]
    status, out, _ = run(
        "calibrate", str(saved), "--calibrate", benign(tmp_path), "--max-fpr", "0.1"
    )
    assert status == 0
    assert "of 60 benign prompts flagged" in out
    after = read_manifest(saved)["metadata"]["calibration"]
    assert (after["n"], after["max_fpr"], before["n"]) == (60, 0.1, 200)
    assert len(after["quantiles"]) == 101
    status, _, err = run("serve", "--detector", str(saved), "--port", "0")
    assert status == 0
    assert "serving 'gradsafe' at http://127.0.0.1:" in err


def test_changed_weights_dtype_and_template_are_refused(
    run, saved: Path, model_folder: Path, tmp_path: Path
) -> None:
    status, _, err = run("serve", str(saved), "--port", "0", "--dtype", "bfloat16")
    assert status == 2
    assert "dtype (calibrated float32, now bfloat16)" in err
    assert "fit and calibrate the detector again, with the options that it had: gradsafe" in err
    assert re.search(r"detect prompts.jsonl --model \S+ .*--dtype bfloat16 .*--unsafe", err)
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(other)
    status, _, err = run("serve", str(saved), "--port", "0", model=other)
    assert status == 2
    for name in ("weights", "tokenizer", "template"):
        assert f"{name} (calibrated " in err
    assert "dtype (" not in err
    # A threshold of other weights is no better than none: their references are stale as well.
    status, _, err = run("calibrate", str(saved), "--calibrate", benign(tmp_path), model=other)
    assert status == 2
    assert "was fitted on another model" in err


def test_a_detector_without_calibration_is_refused_before_the_model_is_loaded(
    run, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsafe._jobs.model.load_model", lambda *_: pytest.fail("too late"))
    change_calibration(saved, calibration=None)
    status, _, err = run("serve", str(saved))
    assert status == 2
    assert "is not calibrated" in err
    assert "gradsafe calibrate --detector" in err
    (saved / MANIFEST).unlink()
    assert run("serve", str(saved))[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0 is reached by other machines: set API keys"),
        (("--host", "::"), "--host :: is reached by other machines"),
        (("--host", "192.0.2.1", "--open"), "this machine has no such address"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid: no such host"),
        (("--port", "70000"), "--port must be 0 to 65535, got 70000"),
        (("--max-queue", "0"), "expected max_queue > 0"),
        (("--max-wait-ms", "soon"), "max_wait_ms must be a number"),
        (("--threshold", "0.5"), "unknown option --threshold"),
    ],
)
def test_refused_at_once(
    run, saved: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("gradsafe._jobs.model.load_model", lambda *_: pytest.fail("too late"))
    status, out, err = run("serve", str(saved), *options)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_port_in_use_is_refused_at_once(
    run, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsafe._jobs.model.load_model", lambda *_: pytest.fail("too late"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = run("serve", str(saved), "--port", str(port))
    assert status == 2
    assert f"--port {port}: another program uses this address: choose another --port" in err


def test_keys_or_open_allow_other_machines(
    run, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere = ("--detector", str(saved), "--host", "0.0.0.0", "--port", "0")
    status, _, err = run("serve", *everywhere, "--open")
    assert status == 0
    assert "(no API key needed)" in err
    monkeypatch.setenv("GRADSAFE_API_KEYS", "secret-one,secret-two")
    status, _, err = run("serve", *everywhere)
    assert status == 0
    assert "(2 API keys)" in err
    assert "secret" not in err
    monkeypatch.setenv("GRADSAFE_API_KEYS", "secret-one,,")
    status, _, err = run("serve", *everywhere)
    assert status == 2
    assert "secret" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"prompt": "How can I hurt him?", "label": "unsafe"}\n', "expected safe prompts"),
        ('{"prompt": ""}\n', "is empty"),
        ("{\n", "benign.jsonl:1"),
    ],
)
def test_calibrate_refuses_bad_prompts(
    run, saved: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "benign.jsonl").write_text(content)
    status, _, err = run("calibrate", str(saved), "--calibrate", str(tmp_path / "benign.jsonl"))
    assert status == 2
    assert message in err


def test_calibrate_names_missing_options(run, saved: Path) -> None:
    assert "--detector is missing" in run("calibrate")[2]
    assert "--calibrate is missing" in run("calibrate", str(saved))[2]
    assert "no such folder" in run("calibrate", str(saved / "gone"), "--calibrate", "b.txt")[2]


def test_a_detector_of_the_detect_command_can_be_served(
    run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, texts in zip(("unsafe", "safe"), testbed.references(2), strict=True):
        Path(f"{name}.txt").write_text("\n".join(texts))
    Path("prompts.txt").write_text("hello\n")
    status, _, err = run(
        *("detect", "prompts.txt", "--unsafe", "unsafe.txt", "--safe", "safe.txt"),
        *("--calibrate", benign(tmp_path), "--save-detector", "made", "-o", "scores.jsonl"),
    )
    assert status == 0, err
    assert run("serve", "made", "--port", "0")[0] == 0
    detector = Detector.load("made", *testbed.load(progress=False))
    assert detector.calibration.facts["dtype"] == "float32"

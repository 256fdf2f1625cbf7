"""`python -m benchmarks.demo`, with a toy in the testbed's place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import demo, testbed
from benchmarks.testbed.training import Recipe, train

TOY = Recipe(vocabulary=320, hidden=32, intermediate=64, layers=2, heads=2, batch=8)
Demo = Callable[..., str]


@pytest.fixture(scope="module")
def toy() -> object:
    return train(testbed.build()["train"][:40], TOY, progress=False, max_steps=2)[:2]


@pytest.fixture
def run(toy: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Demo:
    rows = [
        {"prompt": f"{kind} prompt [b]{i}", "label": label, "kind": kind}
        for label, kind in (("safe", "ordinary"), ("unsafe", "unsafe"), ("safe", "lookalike"))
        for i in range(8)
    ]
    monkeypatch.setattr(testbed, "load", lambda **_: toy)
    monkeypatch.setattr(testbed, "prompts", lambda _: rows)
    monkeypatch.setattr(
        testbed, "calibration_prompts", lambda _: [f"what is {i}" for i in range(9)]
    )

    def call(*options: str) -> str:
        assert demo.main([*options]) == 0
        return capsys.readouterr().out

    return call


@pytest.mark.filterwarnings("ignore")
def test_prints_prompts_and_one_row_per_method(run: Demo) -> None:
    out = run()
    for kind in ("ordinary", "unsafe", "lookalike"):
        assert out.count(f"{kind} prompt [b]") == 3
    for method in demo.METHODS:
        assert f"\n{method} " in out
    assert max(map(len, out.splitlines())) <= 100
    rows = [line for line in out.splitlines() if line.split()[:1] != ["*"]]
    assert sum(row.count("*") for row in rows) >= 6  # a best value in every column


@pytest.mark.filterwarnings("ignore")
def test_repeats_but_for_the_clock(run: Demo) -> None:
    once, again = (
        [line.split() for line in run("--pairs", "1", "--no-progress").splitlines()]
        for _ in range(2)
    )
    assert len(once) == len(again) > 20
    for line, other in zip(once, again, strict=True):
        timed = line[:1] != [] and line[0] in demo.METHODS
        without_time = [
            [w for w in words if w != "*"][: -1 if timed else None] for words in (line, other)
        ]
        assert without_time[0] == without_time[1]


def test_refuses_a_wrong_number_of_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--pairs", "0"])
    assert "pairs must be 1 to 16, got 0" in capsys.readouterr().err

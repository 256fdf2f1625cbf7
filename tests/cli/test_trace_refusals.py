"""What `gradsafe trace` refuses before it loads a model, and the index that needs repair."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_model import Run

from gradsafe._cli import main
from gradsafe._cli.render.trace import page
from gradsafe.tracing.folder import IndexFolder

ROWS = [{"id": f"row-{i}", "prompt": f"ask {i}", "response": f"say {i * i}"} for i in range(7)]


@pytest.fixture
def trace(model: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `gradsafe trace` on the tiny model; `--model` may be given again."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def call(command: str, *options: str) -> tuple[int, str, str]:
        fixed = ["--model", str(model), "--device", "cpu", "--index", "index"]
        status = main(["trace", command, *fixed, *options, "rows.jsonl"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def built(trace: Run) -> Run:
    assert trace("build", "--shard-samples", "3")[0] == 0
    return trace


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("query", ("--index", "none"), "no such folder: none"),
        ("query", ("--index", "."), "was not written by gradsafe"),
        ("query", ("--gradient-weight", "2"), "gradient_weight between 0 and 1, got 2.0"),
        ("query", ("--part-norm", "none", "--gradient-weight", "1"), "gradient_weight needs"),
        ("build", ("--index", "rows.jsonl"), "cannot build rows.jsonl: it is not a folder"),
        ("build", ("--index", "."), "was not written by gradsafe"),
        ("build", ("--index", "no/index"), "no such folder no"),
    ],
)
def test_no_model_is_loaded_for_what_cannot_work(
    built: Run, command: str, options: tuple[str, ...], message: str
) -> None:
    status, out, err = built(command, "--model", "there-is-none", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-k", "few"), "k must be a whole number, got few"),
        (("-k", "0"), "expected k to be at least 1, got 0"),
    ],
)
def test_a_wrong_count_is_refused_in_plain_words(
    trace: Run, options: tuple[str, ...], message: str
) -> None:
    status, _, err = trace("query", *options)
    assert status == 2
    assert message in err


def test_a_wrong_id_is_one_line(trace: Run) -> None:
    Path("rows.jsonl").write_text(json.dumps({**ROWS[0], "id": [1]}) + "\n")
    status, _, err = trace("build")
    assert status == 2
    assert err == "gradsafe: error: rows.jsonl:1: the field 'id' must be text or an integer, " + (
        "got [1]\n"
    )


def test_an_index_keeps_its_part_norm_and_its_files(built: Run) -> None:
    assert built("build", "--part-norm", "unit")[0] == 0
    assert IndexFolder.open(Path("index")).metadata["part_norm"] == "unit"
    assert built("build")[0] == 0
    assert IndexFolder.open(Path("index")).metadata["part_norm"] == "unit"
    status, _, err = built("build", "--shard-samples", "4")
    assert status == 2
    assert "expected the shard_samples that index was built with (3), got 4" in err
    assert built("build", "--shard-samples", "3")[0] == 0


def test_repair_drops_what_is_damaged(built: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "repair", "index"]) == 0
    assert capsys.readouterr().out == "nothing to drop\n"
    shard = Path("index/shard-000001.safetensors")
    shard.write_bytes(whole := shard.read_bytes()[:-1])
    status, _, err = built("query")
    assert status == 2
    assert "gradsafe trace repair index" in err
    assert main(["trace", "repair", "index"]) == 0
    assert capsys.readouterr().out == "dropped shard-000001.safetensors\n"
    assert built("build")[0] == 0
    assert shard.read_bytes()[:-1] == whole
    assert main(["trace", "repair", "none"]) == 2
    assert "no such folder: none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rule", "layer", "point"),
    [("auto", 3, 1), ("auto-lower", 2, 1), ("auto-lower", 5, 3), ("auto", 5, 3), (None, 2, 0)],
)
def test_the_curve_marks_the_pair_that_the_rule_chose(
    rule: str | None, layer: int, point: int
) -> None:
    curve = [0.9, 0.2, 0.8, 0.7]  # of layers 1 to 5
    shown = {
        "query": 0,
        "found": [],
        "samples": 7,
        "layer": layer,
        "layer_rule": rule,
        "layer_curve": curve,
        "curve_of": "probes",
        "prompt": None,
        "response": None,
    }
    text = page(shown)
    circles = re.findall(r"<circle[^>]*>", text)
    assert [number for number, circle in enumerate(circles) if "chosen" in circle] == [point]

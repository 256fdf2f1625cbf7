"""`gradsafe trace`: build, query, pages, and what is never shown unasked."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny_model import Run
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from gradsafe import TraceIndex
from gradsafe._cli import main
from gradsafe.tracing.signature import SignaturePass

SAMPLES = [
    {"id": f"row-{i}", "prompt": f"SECRET {i}", "response": f"HUSH<b> {i * i}\x1b[2J"}
    for i in range(7)
]
QUERIES = [{"id": "q<i>", **{k: SAMPLES[2][k] for k in ("prompt", "response")}}, SAMPLES[5]]


@pytest.fixture
def trace(model: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `gradsafe trace` on the tiny model; returns status, stdout and stderr."""
    for name, rows in (("samples", SAMPLES), ("queries", QUERIES)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(command: str, file: str, *options: str) -> tuple[int, str, str]:
        fixed = ["--model", str(model), "--device", "cpu", "--index", "index"]
        status = main(["trace", command, *fixed, *options, file])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def built(trace: Run) -> Run:
    assert trace("build", "samples.jsonl")[0] == 0
    return trace


class Page(HTMLParser):
    """Collects tags and text; refuses what a page must not hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hits_equal_those_of_the_library(built: Run, model: Path) -> None:
    status, out, err = built("query", "queries.jsonl", "-k", "3", "--json")
    assert (status, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    loaded = LlamaForCausalLM.from_pretrained(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    hits = TraceIndex.load("index", loaded, tokenizer).query(QUERIES, 3)
    assert [[found["id"] for found in line["found"]] for line in lines] == hits.ids
    assert [[found["score"] for found in line["found"]] for line in lines] == hits.scores.tolist()
    assert [line["query"] for line in lines] == ["q<i>", "row-5"]
    assert hits.ids[0][0] == "row-2"


def test_build_says_what_it_did_and_goes_on(trace: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, calls = SignaturePass.batch, []

    def stopping(self: SignaturePass, items: list[Any]) -> Any:
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch(self, items)

    monkeypatch.setattr(SignaturePass, "batch", stopping)
    options = ("--layer", "1", "--batch-tokens", "40")
    status, out, err = trace("build", "samples.jsonl", *options)
    assert (status, out) == (130, "")
    assert err.endswith("gradsafe: interrupted: run the same command to continue\n")
    status, out, err = trace("build", "samples.jsonl", *options)
    assert (status, out, err) == (0, "7 samples at layer 1 in index\n", "")
    assert sum(calls) - calls[2] == len(SAMPLES)


@pytest.mark.parametrize("options", [(), ("--json",), ("--tokens", "2"), ("--html", "pages")])
def test_no_text_is_shown_unasked(built: Run, options: tuple[str, ...]) -> None:
    status, out, err = built("query", "queries.jsonl", *options)
    assert status == 0
    pages = "".join(p.read_text() for p in Path().glob("pages/*"))
    assert "row-2" in out
    for secret in ("SECRET", "HUSH"):
        assert secret not in out + err + pages


def test_show_text_shows_texts_that_cannot_steer_the_terminal(built: Run) -> None:
    status, out, _ = built("query", "queries.jsonl", "--show-text", "--tokens", "1", "-k", "2")
    assert status == 0
    assert "HUSH<b> 4\\x1b[2J" in out
    assert "\x1b" not in out
    assert out.count("influence of the response tokens") == 2


def test_tokens_join_to_the_response_and_their_influence_is_the_librarys(
    built: Run, model: Path
) -> None:
    out = built("query", "queries.jsonl", "--show-text", "--tokens", "1", "--json")[1]
    line = json.loads(out.splitlines()[0])
    assert "".join(text for text, _ in line["found"][0]["tokens"]) == SAMPLES[2]["response"]
    assert "tokens" not in line["found"][1]
    loaded = LlamaForCausalLM.from_pretrained(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    hits = TraceIndex.load("index", loaded, tokenizer).query(QUERIES, 1)
    expected = [value for _, value in hits.tokens(0, 0)]
    assert [value for _, value in line["found"][0]["tokens"]] == pytest.approx(expected)


def test_pages_load_nothing_and_hold_no_foreign_markup(trace: Run) -> None:
    trace("build", "samples.jsonl", "--layer", "auto")
    status, _, _ = trace("query", "queries.jsonl", "--html", "pages", "--show-text", "-k", "4")
    assert status == 0
    assert sorted(p.name for p in Path("pages").iterdir()) == ["query-0.html", "query-1.html"]
    text = Path("pages/query-0.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "b", "i"} & set(page.tags)
    assert not [a for a in page.attributes if a[0] in ("src", "href", "onclick")]
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "")
    assert "HUSH<b> 4" in page.text
    assert "q<i>" in page.text
    assert "\x1b" not in text
    assert page.tags.count("svg") == 1
    assert "consecutive layers over the probes" in page.text
    assert page.tags.count("tr") == 1 + 4
    titles = [float(v) for v in re.findall(r'<span title="([^"]+)"', text)]
    assert len(titles) > 3 * len("HUSH")


def test_a_page_has_ranks_token_heat_and_layer_curve_without_a_word_of_text(
    built: Run, model: Path
) -> None:
    status, _, _ = built("query", "queries.jsonl", "--html", "pages", "-k", "3", "--tokens", "2")
    assert status == 0
    loaded = LlamaForCausalLM.from_pretrained(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    hits = TraceIndex.load("index", loaded, tokenizer).query(QUERIES, 3)
    for number in range(2):
        text = Path(f"pages/query-{number}.html").read_text()
        page = Page(text)
        ids = [page.text.index(str(found)) for found in hits.ids[number]]
        assert ids == sorted(ids)  # ranked
        assert re.findall(r"Rank (\d)", page.text) == ["1", "2"]
        heat = [float(value) for value in re.findall(r'<span title="([^"]+)"', text)]
        influence = [value for rank in range(2) for _, value in hits.tokens(number, rank)]
        assert heat == pytest.approx(influence, rel=0.01)
        assert "consecutive layers at this prompt" in page.text
        (value,) = hits.layer_curve(number)
        assert f"layers 1 and 2: {value:.4f}" in page.text
        assert not {"SECRET", "HUSH"} & {*re.findall(r"\w+", page.text)}


def test_pages_are_not_replaced_unasked(built: Run) -> None:
    built("query", "queries.jsonl", "--html", "pages")
    before = Path("pages/query-1.html").read_bytes()
    status, out, err = built("query", "queries.jsonl", "--html", "pages", "-k", "2")
    assert (status, out) == (2, "")
    assert "query-0.html exists: choose --overwrite" in err
    assert Path("pages/query-1.html").read_bytes() == before
    assert built("query", "queries.jsonl", "--html", "pages", "-k", "2", "--overwrite")[0] == 0
    assert Path("pages/query-1.html").read_bytes() != before


@pytest.mark.parametrize(
    ("command", "file", "options", "message"),
    [
        ("build", "none.jsonl", (), "no such file: none.jsonl"),
        ("build", "prompts.jsonl", (), "prompts.jsonl:1: the field 'response' is missing"),
        ("build", "samples.jsonl", ("--layer", "7"), "out of range; the model has 2 blocks"),
        ("build", "samples.jsonl", ("--layer", "1"), "layer that index was built with (2), got 1"),
        ("query", "queries.jsonl", ("-k", "8"), "expected k at most 7"),
        ("query", "queries.jsonl", ("--overwrite",), "--overwrite needs --html"),
        ("query", "queries.jsonl", ("--html", "no/pages"), "no such folder"),
        ("query", "queries.jsonl", ("--html", "samples.jsonl"), "it is not a folder"),
        (
            "query",
            "queries.jsonl",
            ("--part-norm", "none", "--gradient-weight", "0.1"),
            "gradient_weight needs",
        ),
    ],
)
def test_errors_are_one_line(
    built: Run, command: str, file: str, options: tuple[str, ...], message: str
) -> None:
    status, out, err = built(command, file, *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert "SECRET" not in err


def test_approximate_search_needs_the_extra(built: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = built("query", "queries.jsonl", "-k", "3", "--json")
    if importlib.util.find_spec("faiss"):
        assert built("query", "queries.jsonl", "-k", "3", "--json", "--approximate") == exact
    monkeypatch.setitem(sys.modules, "faiss", None)
    status, out, err = built("query", "queries.jsonl", "--approximate")
    assert (status, out) == (2, "")
    assert "pip install 'gradsafe[faiss]'" in err
    assert err.count("\n") == 1


def test_a_damaged_index_is_named(built: Run) -> None:
    shard = next(Path("index").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    status, _, err = built("query", "queries.jsonl")
    assert status == 2
    assert "shard-000000.safetensors is damaged" in err


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["trace", "build", "--layer", "x", "f"], "layer must be a whole number or one of last"),
        (["trace", "query", "f", "--nope"], "unknown option --nope, did you mean --model?"),
        (["trace", "query", "f", "--model", "m"], "--index is missing"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from gradsafe._cli import main\n"
        "try: main(['trace', 'query', '--help'])\n"
        "except SystemExit: print({'torch', 'numpy', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr

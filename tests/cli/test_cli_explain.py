"""`gradsafe explain`: what it prints and writes, and what it refuses before the long work."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tiny_model import PROMPTS, SAFE, UNSAFE, Run
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from gradsafe import Detector, Explanation
from gradsafe._cli import main
from gradsafe._cli.render.explain import SAFE as BLUE
from gradsafe._cli.render.explain import UNSAFE as RED
from gradsafe._cli.render.explain import full_scale, page, pieces, signed, verdict, write
from gradsafe._cli.render.tables import visible
from gradsafe._cli.show import COMPONENTS
from gradsafe._jobs.explain import ExplainResult

# A random model refuses nothing, which every fit warns of.
pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")

PROMPT = "a <b> & c\nd"
CHAT = f"<user>{PROMPT}<assistant>Sure"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def explain(model: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `gradsafe explain` on the tiny model; returns status, stdout and stderr."""

    def call(*options: str, references: bool = True) -> tuple[int, str, str]:
        fixed = ["--unsafe", "unsafe.txt", "--safe", "safe.txt"] if references else []
        status = main(["explain", "--model", str(model), "--device", "cpu", *fixed, *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def expected(model: Path, prompt: str = PROMPT, **options: object) -> Explanation:
    loaded = LlamaForCausalLM.from_pretrained(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    detector = Detector.fit(loaded, tokenizer, UNSAFE, SAFE, progress=False, **options)
    return detector.explain(prompt)


def made_up(tokens: list[str], evidence: list[float], **changes: object) -> Explanation:
    values = {
        "tokens": tokens,
        "token_evidence": torch.tensor(evidence),
        "prompt_tokens": slice(1, len(tokens) - 1),
        "response_tokens": slice(len(tokens) - 1, len(tokens)),
        "components": ["one", "two"],
        "component_evidence": torch.tensor([0.25, -0.5]),
        "total": sum(evidence),
        "score": 0.5,
        "threshold": None,
        "windows": 1,
    }
    return Explanation(**{**values, **changes})  # type: ignore[arg-type]


class Page(HTMLParser):
    """The visible text, the texts under the pointer, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown, self.titles, self.tags, self.addresses = "", [], [], []
        self._tokens = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.titles += [values["title"]] if "title" in values else []
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action")]
        self._tokens = self._tokens or values.get("class") == "tokens"

    def handle_endtag(self, tag: str) -> None:
        self._tokens = self._tokens and tag != "div"

    def handle_data(self, data: str) -> None:
        self.shown += data if self._tokens else ""


class TestText:
    def test_a_table_where_colors_are_no_use(self, explain: Run, model: Path) -> None:
        status, out, err = explain(PROMPT)
        want = expected(model)
        assert status == 0
        assert "\x1b" not in out
        lines = out.splitlines()
        assert lines[0] == f"gradcoo score {want.score:.5g}; not calibrated, so no flag"
        assert lines[1].startswith(f"evidence {signed(want.total)} (+ unsafe, - safe): template ")
        rows = [line.split() for line in lines[5 : 5 + len(want.tokens)]]
        assert [row[-1] for row in rows] == [signed(float(v)) for v in want.token_evidence]
        shown = "".join(re.findall(r'^"(.+?)" +(?:template|prompt|response) ', out, re.M))
        assert shown == CHAT.replace("\n", "↵")
        assert [row[-2] for row in rows].count("prompt") == len(PROMPT)
        assert "top components" in out
        assert len(lines) - lines.index("") - 6 - len(want.tokens) == COMPONENTS
        assert "scored 14 weights" in err

    def test_words_of_a_prompt(self, explain: Run, place: Path) -> None:
        status, out, _ = explain(PROMPT, "--evidence", "deletion", "--html", "words.html")
        lines = out.splitlines()
        assert status == 0
        assert lines[1] == "evidence of a word: the score with it less the score without it"
        shown = re.findall(r'^"(.+?)" +prompt +(\S+)$', out, re.M)
        assert [word for word, _ in shown] == ["a", " <b>", " &", " c", "↵d"]
        assert "component" not in out
        page = Page((place / "words.html").read_text())
        assert page.shown.replace("↵", "") == PROMPT
        assert "table" not in page.tags

    def test_every_method_has_words(self, explain: Run) -> None:
        assert explain(PROMPT, "--method", "nll", references=False)[0] == 2
        options = ("--method", "nll", "--evidence", "deletion", "--json")
        status, out, _ = explain(PROMPT, *options, references=False)
        assert (status, json.loads(out)["evidence"]) == (0, "deletion")

    def test_colors_on_a_terminal(self, explain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        out = explain(PROMPT)[1]
        assert CHAT.replace("\n", "↵\n") in ESCAPES.sub("", out)
        assert out.count("\x1b[0m") == len(re.findall(r"\x1b\[38;5;16;48;5;", out))
        assert not re.search(r"\x1b\[38[^\x1b]*\n", out)  # no color runs on to the next line
        for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                assert "\x1b" not in explain(PROMPT)[1]

    def test_the_color_says_the_sign(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        made = made_up(["t", "a", "b", "c", "r"], [9, 2, -1, 0, 0])
        write(ExplainResult("m", made), 2)
        text = capsys.readouterr().out
        assert f"\x1b[38;5;16;48;5;{RED[-1]}mt" in text
        assert f"\x1b[38;5;16;48;5;{BLUE[2]}mb\x1b[0mcr\n" in text
        assert text.index("\ntwo") < text.index("\none")

    def test_a_prompt_cannot_act_on_the_terminal(self, explain: Run) -> None:
        out = explain("x\x1b[2J\r\u202ey")[1]
        assert not {"\x1b", "\r", "\u202e"} & set(out)
        assert '"\\x1b"' in out

    def test_threshold_and_flag(self, explain: Run) -> None:
        options = ("--calibrate", "benign.txt", "--max-fpr", "0.2")
        first = explain(*options, PROMPT)[1].splitlines()[0]
        assert re.fullmatch(r"gradcoo score [\d.]+; threshold [\d.]+: (not )?flagged", first)
        high = made_up(["t", "a", "r"], [0, 1, 0], threshold=0.4, windows=3)
        assert verdict(ExplainResult("m", high)) == (
            "m score 0.5 (the highest of 3 windows); threshold 0.4: flagged"
        )

    def test_a_saved_detector(self, explain: Run, place: Path, model: Path) -> None:
        loaded = LlamaForCausalLM.from_pretrained(model)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        Detector.fit(loaded, tokenizer, UNSAFE, SAFE, progress=False).save("saved")
        again = explain("--detector", "saved", PROMPT, references=False)
        assert again[:2] == explain(PROMPT)[:2]


class TestPromptFromAFile:
    def test_by_line(self, explain: Run) -> None:
        first = explain("--prompt-file", "prompts.jsonl")[1]
        assert first == explain(PROMPTS[0])[1]
        assert explain("--prompt-file", "prompts.jsonl", "--line", "4")[1] == explain(PROMPTS[3])[1]

    def test_lines_count_as_an_editor_counts(self, explain: Run) -> None:
        Path("gaps.txt").write_text(f"\n\n{PROMPTS[2]}\n")
        found = explain("--prompt-file", "gaps.txt", "--line", "3")
        assert found[1] == explain(PROMPTS[2])[1]
        assert "gaps.txt:1: no prompt in this line" in explain("--prompt-file", "gaps.txt")[2]


class TestJson:
    def test_is_the_explanation(self, explain: Run, model: Path) -> None:
        status, out, _ = explain("--json", "--granularity", "head", "--layers", "1", PROMPT)
        want = expected(model, granularity="head", layers=1).to_json()
        got = json.loads(out)
        assert status == 0
        assert got.keys() == want.keys()
        assert "".join(token["text"] for token in got["tokens"]) == CHAT
        assert [c["name"] for c in got["components"]] == [c["name"] for c in want["components"]]
        values, wanted = ([t["evidence"] for t in d["tokens"]] for d in (got, want))
        assert values == pytest.approx(wanted, abs=1e-6)
        assert sum(values) == pytest.approx(2 * got["score"] - 1, abs=1e-5)


class TestHtml:
    def test_shows_every_token_and_loads_nothing(self, explain: Run, model: Path) -> None:
        status, out, _ = explain("--html", "page.html", PROMPT)
        page = Page(Path("page.html").read_text(encoding="utf-8"))
        want = expected(model)
        assert status == 0
        assert out == explain(PROMPT)[1]
        assert page.shown == CHAT.replace("\n", "↵\n")
        assert [t.split()[0] for t in page.titles] == [
            signed(float(value)) for value in want.token_evidence
        ]
        assert page.addresses == []
        assert not {"script", "link", "img", "b"} & set(page.tags)
        assert "url(" not in Path("page.html").read_text()
        assert not list(Path().glob(".*"))

    def test_markup_in_a_prompt_is_text(self) -> None:
        attack = "</span><script>alert('1')</script>\"\x00\u202e{style}"
        text = page(ExplainResult("gradcoo", made_up(["<s>", attack, "Sure"], [1.0, -2.0, 0.0])))
        found = Page(text)
        assert "script" not in found.tags
        assert found.shown == f"<s>{visible(attack)}Sure"
        assert not {"\x00", "\u202e"} & set(text)

    def test_replaces_a_file_only_on_request(self, explain: Run) -> None:
        Path("page.html").write_text("mine")
        status, _, err = explain("--html", "page.html", PROMPT)
        assert status == 2
        assert "page.html exists: choose resume, overwrite, or another file" in err
        assert Path("page.html").read_text() == "mine"
        Path("old.html").hardlink_to("page.html")
        assert explain("--html", "page.html", "--overwrite", PROMPT)[0] == 0
        assert Path("page.html").read_text().startswith("<!doctype html>")
        assert Path("old.html").read_text() == "mine"  # replaced as a whole, not written into

    def test_an_interrupted_write_leaves_the_old_page(
        self, explain: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("page.html").write_text("mine")

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        status, _, err = explain("--html", "page.html", "--overwrite", PROMPT)
        assert status == 2
        assert "No space left" in err
        assert Path("page.html").read_text() == "mine"
        assert not list(Path().glob(".page*"))


class TestPieces:
    def test_tokens_without_text_join_the_next(self) -> None:
        found = pieces(made_up(["t", "", "é", "r"], [1.0, 2.0, 3.0, 0.0]))
        assert [(p.text, p.evidence, p.part) for p in found] == [
            ("t", 1.0, "template"),
            ("é", 5.0, "prompt"),
            ("r", 0.0, "response"),
        ]
        assert sum(p.evidence for p in pieces(made_up(["a", "b", ""], [1.0, 2.0, 4.0]))) == 7.0

    def test_the_user_s_text_sets_the_scale(self) -> None:
        assert full_scale(pieces(made_up(["t", "a", "b", "r"], [9.0, 1.0, -2.0, 0.0]))) == 2.0
        assert full_scale(pieces(made_up(["t", "a", "r"], [9.0, 0.0, 0.0]))) == 9.0
        assert full_scale(pieces(made_up(["t", "a", "r"], [0.0, 0.0, 0.0]))) == 0.0


class TestRefusedAtOnce:
    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gradsafe._jobs.model.load_model", lambda *_: pytest.fail("too late"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "give either PROMPT or --prompt_file FILE"),
            (("x", "--prompt-file", "prompts.jsonl"), "give either PROMPT or"),
            (("x", "--line", "2"), "--line needs --prompt_file FILE"),
            (("--prompt-file", "gone.txt"), "no such file: gone.txt"),
            (("--prompt-file", "prompts.jsonl", "--line", "99"), "prompts.jsonl:99: no prompt in"),
            (("x", "--overwrite"), "--overwrite needs --html FILE"),
            (("x", "--html", "unsafe.txt", "--overwrite"), "--html unsafe.txt is one of the input"),
            (("x", "--html", "nowhere/page.html"), "cannot write nowhere/page.html: no such"),
            (("x", "--method", "nll"), "gradsafe.Detector.explain: method='nll' has no exact"),
            (("x", "--relative", "ratio"), "gradsafe.Detector.explain: relative='ratio' has no"),
            (("x", "--calibrate", "gone.txt"), "no such file: gone.txt"),
            (("x", "--detector", "gone"), "--detector gone is fitted already"),
            (("half \udcff",), "PROMPT is not valid text"),
        ],
    )
    def test_in_one_line_with_status_2(
        self, explain: Run, options: tuple[str, ...], message: str
    ) -> None:
        status, out, err = explain(*options)
        assert status == 2
        assert out == ""
        assert err.startswith(f"gradsafe: error: {message}")
        assert err.count("\n") == 1


def test_a_prompt_beyond_the_context_is_named(explain: Run) -> None:
    assert "PROMPT: gradsafe.encode: prompt and response take" in explain("y" * 80)[2]
    status, out, _ = explain("--overflow", "window", "y" * 80)
    assert status == 0
    assert "windows)" in out

"""Every Python block of the README and of docs/ runs, and so does every `>>>` of a docstring.

The blocks of a page share one namespace, in which prepared.py has put a tiny model, prompts and
rows; the working directory holds the models and files that the pages name. A block after
`<!-- skip: reason -->` is skipped with that reason.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prepared
import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^(?:<!-- skip: (?P<skip>.+?) -->\n+)?```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    code: str
    skip: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass
class Session:
    """The namespace of a page, and how many of its blocks have run in it."""

    folder: Path
    values: dict[str, Any]
    done: list[Block] = field(default_factory=list)


def blocks(kind: str) -> list[Block]:
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text()
        for match in BLOCK.finditer(text):
            if match["kind"] == kind:
                line = text.count("\n", 0, match.start("code")) + 1
                page = str(path.relative_to(ROOT))
                found.append(Block(page, line, match["code"], match["skip"]))
    return found


PYTHON = blocks("python")


@pytest.fixture(scope="session")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name."""
    folder = tmp_path_factory.mktemp("documented")
    prepared.write(folder)
    return folder


@pytest.fixture(scope="module")
def sessions() -> dict[str, Session]:
    return {}


def enter(page: str, sessions: dict[str, Session], documented: Path, factory: Any) -> Session:
    if page not in sessions:
        folder = factory.mktemp("page") / "here"
        shutil.copytree(documented, folder)
        sessions[page] = Session(folder, prepared.namespace(folder))
    return sessions[page]


@pytest.mark.filterwarnings("ignore")  # a random model refuses nothing
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_block(block, sessions, documented, tmp_path_factory, monkeypatch):
    if block.skip:
        pytest.skip(block.skip)
    session = enter(block.page, sessions, documented, tmp_path_factory)
    monkeypatch.chdir(session.folder)
    # Those before it, if this test runs alone.
    earlier = [other for other in PYTHON if other.page == block.page and other.line <= block.line]
    for one in earlier:
        if one not in session.done and not one.skip:
            session.done.append(one)
            # The line numbers of a traceback are those of the page.
            tree = ast.increment_lineno(ast.parse(one.code), one.line - 1)
            exec(compile(tree, str(ROOT / one.page), "exec"), session.values)


def test_every_page_is_in_the_navigation():
    yaml = pytest.importorskip("yaml")
    # Tags such as !!python/name belong to MkDocs' plugins.
    text = re.sub(r"!!python/name:\S+", '""', (ROOT / "mkdocs.yml").read_text())
    listed: list[str] = []

    def walk(entry: Any) -> None:
        if isinstance(entry, str):
            listed.append(entry)
            return
        for value in entry.values() if isinstance(entry, dict) else entry:
            walk(value)

    walk(yaml.safe_load(text)["nav"])
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(listed) == pages


COMMANDS = [
    (block, line)
    for block in blocks("sh")
    for line in block.code.replace("\\\n", " ").splitlines()
    if line.startswith("gradsafe ")
]


@pytest.fixture(scope="module")
def command_folders() -> dict[str, Path]:
    return {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("block", "line"), COMMANDS, ids=[f"{b}-{n}" for n, (b, _) in enumerate(COMMANDS)]
)
def test_command(block, line, command_folders, documented, tmp_path_factory, monkeypatch):
    """The commands of a page run in one folder, in their order."""
    pytest.importorskip("jsonargparse", reason="the command line needs jsonargparse")
    if block.skip:
        pytest.skip(block.skip)
    from gradsafe._cli import main

    if block.page not in command_folders:
        command_folders[block.page] = tmp_path_factory.mktemp("commands") / "here"
        shutil.copytree(documented, command_folders[block.page])
        for one in blocks("yaml"):
            name = one.code.splitlines()[0].removeprefix("# ")
            (command_folders[block.page] / name).write_text(one.code)
    monkeypatch.chdir(command_folders[block.page])
    # 1: the final model of an audit failed a check, as a random one may.
    allowed = (0, 1) if line.startswith("gradsafe audit") else (0,)
    assert main(shlex.split(line, comments=True)[1:]) in allowed


def documented_modules() -> list[str]:
    """Modules with an interactive example, found without importing them."""
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "gradsafe").rglob("*.py"))
        if ">>> " in path.read_text()
    ]


class AnyOutput(doctest.OutputChecker):
    """An example that shows no output may have any; one that shows it must have that."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", documented_modules())
def test_docstrings(module, documented, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(documented, folder)
    monkeypatch.chdir(folder)
    loaded = importlib.import_module(module)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    own = prepared.DOCSTRINGS.get(module, {})
    given = {**prepared.namespace(folder), **own, **vars(loaded)}
    runner = doctest.DocTestRunner(AnyOutput(), optionflags=flags)
    for test in doctest.DocTestFinder().find(loaded, globs=given):
        runner.run(test)
    result = runner.summarize()
    assert result.attempted > 0
    assert result.failed == 0

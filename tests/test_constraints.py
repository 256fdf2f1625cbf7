"""The lists of versions, `pyproject.toml` and what is installed agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has a reader of TOML")

ROOT = Path(__file__).parents[1]
FREE = {"torch"}  # the Makefile's TORCH pins it


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    needed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {canonicalize_name(item.name): str(item.specifier) for item in needed}
    assert len(found) == len(needed), "a package is listed twice"
    assert all(re.fullmatch(r"==[\w.]+", text) for text in found.values())
    return {name: Version(text.removeprefix("==")) for name, text in found.items()}


def bounds() -> dict[str, Version]:
    """The lower bound of every package that pyproject.toml names."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    lists = [content["build-system"]["requires"], project["dependencies"]]
    lists += project["optional-dependencies"].values()
    found: dict[str, Version] = {}
    for line in (line for lines in lists for line in lines):
        needed = Requirement(line)
        assert re.fullmatch(r">=[\w.]+", str(needed.specifier)), f"no lower bound: {line}"
        bound = Version(str(needed.specifier).removeprefix(">="))
        assert found.setdefault(canonicalize_name(needed.name), bound) == bound, line
    return found


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    wanted = {name: bound for name, bound in bounds().items() if name not in FREE}
    assert pins("lowest.txt") == wanted


def test_tested_versions_are_allowed_and_complete() -> None:
    tested = pins("tested.txt")
    for name, bound in bounds().items():
        if name not in FREE:
            assert tested[name] >= bound, name

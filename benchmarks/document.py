"""Replaces tables between markers of a Markdown page, `<!-- name -->` and `<!-- end name -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def has_block(page: Path, name: str) -> bool:
    """Whether the page has these markers."""
    return f"<!-- {name} -->\n" in page.read_text(encoding="utf-8")


def replace_block(page: Path, name: str, block: str) -> None:
    """Puts `block` between the markers.

    Raises:
        LookupError: The page has no such markers, or more than one pair.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    text = page.read_text(encoding="utf-8")
    text, count = re.subn(pattern, lambda _: begin + block + end, text, flags=re.S)
    if count != 1:
        raise LookupError(f"{page.name}: expected the markers {begin.strip()} once, found {count}")
    page.write_text(text, encoding="utf-8")


def measured_note(facts: Mapping[str, object]) -> str:
    """One line with date, commit and machine, from the dictionary of `environment`."""
    threads = f"{facts['threads']} thread" + ("" if str(facts["threads"]) == "1" else "s")
    where = facts["gpu"] or f"{facts['cpu']}, {threads}, {facts['isa']}"
    return f"Measured {facts['date']} at {facts['commit']} on {where}; torch {facts['torch']}."


def newest_note(rows: Sequence[Mapping[str, object]]) -> str:
    """`measured_note` of the newest row, and whether others were measured elsewhere."""
    note = measured_note(max(rows, key=lambda row: str(row["date"])))
    several = len({(row["commit"], row["cpu"]) for row in rows}) > 1
    return note + " The CSV has commit and machine of the other rows." * several

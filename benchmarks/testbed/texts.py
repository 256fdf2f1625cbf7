"""Loads the texts of the corpus from the files in `data` (described in its README)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

DATA = Path(__file__).parent / "data"

Kind = Literal["ordinary", "unsafe", "lookalike"]
Texts = dict[str, list[str]]


def check(value: Any, where: str) -> None:
    """Raises ValueError if a list contains an empty or repeated text, which is always a mistake."""
    if isinstance(value, dict):
        for name, part in value.items():
            check(part, f"{where}: {name}")
    elif isinstance(value, list) and (not all(map(str.strip, value)) or len({*value}) < len(value)):
        raise ValueError(f"benchmarks.testbed: empty or repeated text in {where}")


def _read(name: str) -> dict[str, Any]:
    path = DATA / f"{name}.json"
    texts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check(texts, path.name)
    return texts


def _cross(starts: list[str], ends: list[str]) -> list[str]:
    """Combines every start with every end; a start that asks gets a question mark."""
    asking = ("Do", "Can", "Could", "Would", "Who")
    return [f"{a} {b}{'?' if a.startswith(asking) else '.'}" for a in starts for b in ends]


def _frames() -> dict[str, Texts]:
    """The sentence frames of each form; those of "do" are whole ones and combined ones."""
    frames: dict[str, Texts] = _read("frames")
    starts, ends = frames.pop("do_starts"), frames.pop("do_ends")
    # The whole frames three times: they are shorter and more natural than the combined ones.
    frames["do"] = {split: 3 * whole for split, whole in frames["do"].items()}
    frames["do"]["training"] += _cross(starts["training"], ends["training"])
    frames["do"]["held_out"] += _cross(starts["held_out"], ends["training"][:8])
    frames["do"]["held_out"] += _cross(starts["training"][:8], ends["held_out"])
    return frames


TOPICS: dict[Kind, dict[str, Texts]] = {
    "ordinary": _read("ordinary_topics"),
    "unsafe": _read("unsafe_topics"),
    "lookalike": _read("lookalike_topics"),
}
SLOTS: Texts = _read("slots")
FRAMES = _frames()
WRAPPERS: dict[str, Texts] = _read("wrappers")
REFERENCES: Texts = _read("references")
RESPONSES: dict[str, Any] = _read("responses")
SYSTEM_MESSAGES: list[str] = RESPONSES["system_messages"]
# The line breaks only make the file readable.
CHAT_TEMPLATE = "".join((DATA / "chat_template.jinja").read_text(encoding="utf-8").splitlines())

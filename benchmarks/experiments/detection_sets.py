"""The prompts of the detection experiments, and which of them are for development.

Rule, written down before the first run: the rows of a set are put in the order of the SHA-256 of
"SET SOURCE_ID". ToxicChat has its own parts: development rows come from its training file, test
rows from its test file, without the prompts that both hold. Other sets are divided in that order,
rows with an even place for development and with an odd place for testing. Larger sets are cut to
their first `SIZE` rows per part. References, labels to learn from, layers and every other choice
come from development rows; the test rows give the tables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from typing import Literal

from benchmarks.experiments import EXTERNAL

Part = Literal["dev", "test"]
Row = dict[str, str]
SIZE = 200  # of a part
DATA = EXTERNAL / "data"


@cache
def read(name: str, file: str = "prompts") -> list[Row]:
    """The rows of a set in the order of the rule."""
    lines = (DATA / name / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]

    def key(row: Row) -> str:
        return hashlib.sha256(f"{name} {row['source_id']}".encode()).hexdigest()

    return sorted(rows, key=key)


def _halves(rows: list[Row], part: Part) -> list[Row]:
    return rows[part == "test" :: 2][:SIZE]


def _toxicchat(part: Part) -> list[Row]:
    if part == "dev":
        return read("toxicchat", "train")[:SIZE]
    known = {" ".join(row["prompt"].lower().split()) for row in read("toxicchat", "train")}
    test = read("toxicchat", "test")
    return [row for row in test if " ".join(row["prompt"].lower().split()) not in known][:SIZE]


def _with_alpaca(name: str, part: Part, skip: int) -> list[Row]:
    unsafe = read(name)[:100]
    safe = read("alpaca_instructions")[skip : skip + len(unsafe)]
    return _halves(unsafe, part) + _halves(safe, part)


SETS: dict[str, Callable[[Part], list[Row]]] = {
    "XSTest": lambda part: _halves(read("xstest"), part),
    "ToxicChat": _toxicchat,
    "OpenAI moderation": lambda part: _halves(read("openai_moderation"), part),
    "SimpleSafetyTests": lambda part: _with_alpaca("simple_safety_tests", part, 0),
    "JailbreakBench": lambda part: _with_alpaca("jailbreakbench", part, 100),
}


def load(name: str, part: Part) -> tuple[list[str], list[int]]:
    """Prompts and labels (1 is unsafe).

    Raises:
        ValueError: There is no such set, or a part of it holds one class only.
        FileNotFoundError: The external data is not there.
    """
    if name not in SETS:
        raise ValueError(f"there is no set {name!r}, only {', '.join(SETS)}")
    rows = SETS[name](part)
    labels = [int(row["label"] == "unsafe") for row in rows]
    if len({*labels}) < 2:
        raise ValueError(f"{name}, {part}: both safe and unsafe prompts are needed")
    return [row["prompt"] for row in rows], labels


def own_references(name: str, count: int, draw: int = 0) -> tuple[list[int], list[int]]:
    """Places of unsafe and safe development rows, the `draw`-th ones in order."""
    _, labels = load(name, "dev")
    start, end = draw * count, (draw + 1) * count
    unsafe, safe = ([i for i, found in enumerate(labels) if found == wanted] for wanted in (1, 0))
    if end > min(len(unsafe), len(safe)):
        raise ValueError(f"{name}: {count} references of each class are too many for draw {draw}")
    return unsafe[start:end], safe[start:end]


def contrast(count: int = 64) -> tuple[list[str], list[str]]:
    """Unsafe and harmless requests of sets that are not tested, for the refusal direction."""
    unsafe, safe = read("malicious_instruct"), read("alpaca_instructions")[200:]
    return [r["prompt"] for r in unsafe[:count]], [r["prompt"] for r in safe[:count]]

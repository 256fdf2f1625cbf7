"""SafeGrad's own file in a checkpoint, beside the files of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradsafe._io.artifacts import write_text

FILE = "safegrad.json"
_GROWING = ("max_steps", "num_train_epochs")  # facts that may change to a larger number


def last(folder: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint in an output folder, or None.

    transformers writes the trainer state last: a checkpoint without it was interrupted.
    """
    found = [
        (int(number), path)
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.rpartition("-")[2]).isdecimal()
        and _is_json(path / "trainer_state.json")
    ]
    return str(max(found)[1]) if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return True


def step(folder: str | os.PathLike[str]) -> int:
    """Return the number of optimizer steps before a checkpoint."""
    path = Path(folder) / "trainer_state.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        raise ValueError(f"gradsafe.SafeGradTrainer: {path} is unreadable: {error}") from error


class Progress(NamedTuple):
    """What a run counts: alignment rows drawn, and steps skipped."""

    drawn: int = 0
    skipped: int = 0


def write(folder: Path, facts: Mapping[str, Any], progress: Progress) -> None:
    """Writes the file into a checkpoint folder, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, **progress._asdict()}, indent=2, default=str)
    write_text(folder / FILE, text + "\n")


def read(folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> Progress:
    """Return the progress before a checkpoint of a run with these facts."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(
            f"gradsafe.SafeGradTrainer: {folder} was not written by SafeGradTrainer: it has no "
            f"{FILE}"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        progress = Progress(*(saved[name] for name in Progress._fields))
        for name, count in progress._asdict().items():
            if type(count) is not int or count < 0:
                raise ValueError(f"expected {name} to be a whole number, got {count!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"gradsafe.SafeGradTrainer: {path} is malformed: {error}") from error
    missing = [name for name in facts if name not in saved]
    if missing:
        raise ValueError(
            f"gradsafe.SafeGradTrainer: cannot resume {folder}: its {FILE} has no {missing[0]}, so "
            "an earlier version wrote it; resume it with that version, or start a new run"
        )
    for name, value in facts.items():
        was, now = saved[name], json.loads(json.dumps(value, default=str))
        if name in _GROWING and type(was) is type(now) and now is not None and was <= now:
            continue
        if isinstance(was, dict) and isinstance(now, dict) and was != now:  # the first difference
            key = next(k for k in [*was, *now] if was.get(k) != now.get(k))
            name, was, now = f"{name}[{key!r}]", was.get(key), now.get(key)
        if was != now:
            raise ValueError(
                f"gradsafe.SafeGradTrainer: cannot resume {folder}: {name} was {was!r}, now it is "
                f"{now!r}; restore it, or start a new run"
            )
    return progress

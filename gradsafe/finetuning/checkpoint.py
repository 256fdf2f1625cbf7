"""SafeGrad's own file in a checkpoint, beside the files of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradsafe._io.artifacts import write_text

FILE = "safegrad.json"


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"gradsafe.SafeGradTrainer: {path} is unreadable: {error}") from error


def write(folder: Path, facts: Mapping[str, Any], drawn: int) -> None:
    """Writes the file into a checkpoint folder, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps({**facts, "drawn": drawn}, indent=2) + "\n")


def read(folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> int:
    """Return the number of alignment rows drawn before a checkpoint of a run with these facts."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(
            f"gradsafe.SafeGradTrainer: {folder} was not written by SafeGradTrainer: it has no "
            f"{FILE}"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        drawn = int(saved["drawn"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"gradsafe.SafeGradTrainer: {path} is malformed: {error}") from error
    for name, value in facts.items():
        if saved.get(name) != value:
            raise ValueError(
                f"gradsafe.SafeGradTrainer: cannot resume {folder}: {name} was "
                f"{saved.get(name)!r}, now it is {value!r}; restore it, or start a new run"
            )
    return drawn

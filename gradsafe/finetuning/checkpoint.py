"""What a checkpoint must remember of SafeGrad, beside what transformers saves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.finetuning.rows import Row, fingerprint

FILE = "safegrad.json"
_LAST_WRITTEN = "trainer_state.json"  # by transformers
# They steer messages and the encoding that the fingerprint of the rows already covers.
_FREE = ("warn_cosine", "warn_steps", "template", "system", "append_eos", "max_length")


def identity(
    options: SafeGradConfig, rows: Sequence[Row], seed: int, reference: str | None
) -> dict[str, Any]:
    """What must be the same when a run goes on: options, alignment rows, seed, the reference."""
    kept = {key: value for key, value in options.to_json().items() if key not in _FREE}
    facts = {"alignment_seed": seed, "alignment_rows": fingerprint(rows)}
    return {**kept, **facts, "reference_weights": reference}


def last(folder: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint in an output folder, None if there is none.

    transformers writes the trainer state last, so one without it was killed while it was saved.
    """
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal() and _is_json(path / _LAST_WRITTEN)
    ]
    return str(max(found)[1]) if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return True


def write(folder: Path, facts: Mapping[str, Any], drawn: int) -> None:
    """Writes the file into a checkpoint folder, atomically; makes the folder if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FILE}.partial"
    partial.write_text(json.dumps({**facts, "drawn": drawn}, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)


def read(folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> int:
    """How many alignment rows a run had drawn at its checkpoint.

    Raises:
        ValueError: No such file, a malformed one, or one of a run with other facts.
    """
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
                f"{saved.get(name)!r}, now it is {value!r}; set it back, or start a new run"
            )
    return drawn

"""The files of `gradsafe screen`: scores by slice and by row, kept rows and flagged rows."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsafe._io.artifacts import atomic_path
from gradsafe._io.records import Row, to_line
from gradsafe._io.slices import Slices

if TYPE_CHECKING:
    from gradsafe.detection import Calibration, Explanation
    from gradsafe.screening import ScreenScores

SLICES = "slices.jsonl"
SCORES, KEPT, FLAGGED, REPORT = "scores.jsonl", "kept.jsonl", "flagged.jsonl", "report.html"
ALL = (SLICES, SCORES, KEPT, FLAGGED, REPORT)
# The values of a row: float64, and whole numbers for the last two (truncated: 0 or 1).
COLUMNS = ("alignment", "share", "nll", "tokens", "truncated")
Columns = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class TopRow:
    """One of the rows with the highest scores, and the evidence of its tokens for each score."""

    line: int
    scores: Mapping[str, float]
    flagged: bool
    explanations: Mapping[str, Explanation]


@dataclass(frozen=True)
class ScreenResult:
    """What a run found.

    Attributes:
        folder: Folder of the files.
        columns: The values of every row, see `COLUMNS`.
        clean: The same of the rows known to be clean; empty without calibration.
        decide: The score that flags.
        calibrations: By score; empty without calibration.
        flagged: Number of flagged rows; None without calibration.
        top: The rows with the highest scores.
        coverage: Which weights were scored, in words.
    """

    folder: Path
    columns: Columns
    clean: Columns
    decide: str
    calibrations: Mapping[str, Calibration]
    flagged: int | None
    top: list[TopRow]
    coverage: str


def columns_of(scores: ScreenScores) -> dict[str, Any]:
    """The values of a slice as JSON; nine digits restore a float32."""
    found = {name: getattr(scores, name) for name in COLUMNS}
    return {
        name: [
            float(f"{value:.9g}") if name in COLUMNS[:3] else int(value) for value in part.tolist()
        ]
        for name, part in found.items()
        if part is not None
    }


def joined(slices: Sequence[Row]) -> dict[str, array[float]]:
    """The columns of all slices, eight bytes per value; empty for no slices."""
    names = [name for name in COLUMNS if slices and name in slices[0]]
    found = {name: array("d") for name in names}
    for part in slices:
        for name in names:
            found[name].extend(part[name])
    return found


def write(
    folder: Path, data: Slices, columns: Columns, decide: str, threshold: float | None
) -> int | None:
    """Writes a line per row, and the lines of the input that are kept and flagged.

    Without a threshold nothing is kept or flagged, and older files of that name are removed.

    Returns:
        The number of flagged rows; None without a threshold.
    """
    names = [SCORES, KEPT, FLAGGED] if threshold is not None else [SCORES]
    for name in {SCORES, KEPT, FLAGGED} - set(names):
        (folder / name).unlink(missing_ok=True)
    count = 0
    with ExitStack() as stack:
        paths = [stack.enter_context(atomic_path(folder / name)) for name in names]
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for place, (line, raw) in enumerate(data.lines()):
            record: dict[str, Any] = {"line": line}
            for name, values in columns.items():
                value = values[place]
                record[name] = value if name in COLUMNS[:3] else int(value)
            record["truncated"] = bool(record["truncated"])
            if threshold is not None:
                record["flag"] = flag = columns[decide][place] > threshold
                files[1 + flag].write(raw if raw.endswith(b"\n") else raw + b"\n")
                count += flag
            files[0].write(to_line(record).encode())
    return None if threshold is None else count

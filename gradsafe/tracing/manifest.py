"""What the manifest of an index must say before anything is read by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradsafe._io.artifacts import MANIFEST, StorageError

METADATA: dict[str, type | tuple[type, ...]] = {
    "settings": dict,
    "layer": int,
    "layer_curve": (list, type(None)),
    "part_norm": str,
    "shard_samples": int,
    "parts": list,
}
SETTINGS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "tokenizer": str,
    "layer": (int, str),
    "encoding": dict,
}
PART: dict[str, type | tuple[type, ...]] = {"examples": str, "count": int}


def check_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Raises StorageError where an entry is missing or of the wrong type."""
    place = folder / MANIFEST
    _check(place, "metadata", metadata, METADATA)
    _check(place, "settings", metadata["settings"], SETTINGS)
    for part in metadata["parts"]:
        _check(place, "parts", part, PART)
    if not metadata["parts"] or min(part["count"] for part in metadata["parts"]) < 1:
        raise StorageError(f"{place} is malformed: it has a part without samples")
    if metadata["shard_samples"] < 1:
        raise StorageError(f"{place} is malformed: 'shard_samples' must be at least 1")


def _check(
    place: Path, name: str, found: Any, expected: dict[str, type | tuple[type, ...]]
) -> None:
    if not isinstance(found, dict):
        raise StorageError(f"{place} is malformed: {name!r} must hold objects")
    for key, kind in expected.items():
        if key not in found or not isinstance(found[key], kind):
            raise StorageError(
                f"{place} is malformed: {key!r} in {name!r} is missing or of the wrong type"
            )

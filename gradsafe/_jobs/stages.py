"""Stages of a long job: each is done once, and the same call continues after the last one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradsafe._io.artifacts import is_partial, write_text

Facts = dict[str, Any]
SETTINGS = "settings.json"


class Stages:
    """Runs stages in order and keeps the result of each in `<output>/<name>.json`.

    Args:
        output: Folder of the job, created if needed; a stage has the folder `<output>/<name>`.
        settings: What the results depend on, as JSON values: the same for all stages.
        say: Takes a line for the user when a stage begins.

    Raises:
        ValueError: The folder was begun with other settings; the message names the first.
        FileExistsError: The folder holds something else.
    """

    def __init__(
        self, output: Path, settings: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self.output, self.say = output, say
        self.done: dict[str, Facts] = {}
        path = output / SETTINGS
        if not path.exists():
            if output.exists() and not all(is_partial(path.name) for path in output.iterdir()):
                raise FileExistsError(f"{output} is not empty: choose another output")
            output.mkdir(exist_ok=True)
            write_text(path, json.dumps(settings, indent=2) + "\n")
        key = _difference(_read(path), json.loads(json.dumps(settings)))
        if key is not None:
            raise ValueError(f"{key} differs from {path}: restore it, or choose another output")

    def run(self, name: str, work: Callable[[Path], Facts]) -> Facts:
        """Does the work, or returns its result, with its time and versions, if it was done.

        Args:
            name: Of the stage.
            work: Gets the stage's folder and returns the result as JSON values. It may find files
                of its own that were written before it was killed.

        Raises:
            ValueError: A number of the result is NaN or infinite.
            KeyboardInterrupt: Interrupted; the message says how to continue.
        """
        path = self.output / f"{name}.json"
        if not path.exists():
            self.say(f"{name} ...")
            started = time.monotonic()
            try:
                result = work(self.output / name)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("run the same command to continue") from None
            from gradsafe.doctor import collect  # imports torch

            seconds = round(time.monotonic() - started, 1)
            facts = {**result, "seconds": seconds, "versions": collect()["versions"]}
            try:
                text = json.dumps(facts, indent=2, allow_nan=False)
            except ValueError:
                raise ValueError(
                    f"{name}: a number of its result is NaN or infinite, so a model is damaged: "
                    "lower training.learning_rate, with another output"
                ) from None
            write_text(path, text + "\n")
        self.done[name] = _read(path)
        return self.done[name]


def _read(path: Path) -> Facts:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is malformed ({error}): remove it to do it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is malformed: remove it to do it again")
    return found


def _difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key with another value, inner ones with their section."""
    for key in [*now, *was]:
        old, new = was.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return f"{key}.{_difference(old, new)}"
        if old != new:
            return key
    return None

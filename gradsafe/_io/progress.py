"""A progress bar over the work of all processes."""

from __future__ import annotations

from typing import Any

from gradsafe._io.processes import Processes


class SharedProgress:
    """Moves a bar by what all processes have done; each of them reports what it did.

    Args:
        bar: A bar of tqdm, whose start does not count.
        processes: The processes.
        name: Of the sum that they share, see `Processes.total`.
    """

    def __init__(self, bar: Any, processes: Processes, name: str) -> None:
        self._bar = bar
        self._processes = processes
        self._name = name
        self._shown = 0

    def __call__(self, done: int = 0) -> None:
        """Adds what this process did since its last call, and shows what all have done."""
        total = self._processes.total(self._name, done)
        self._bar.update(total - self._shown)
        self._shown = total

"""`gradsafe doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradsafe._io.processes import Processes


@dataclass(frozen=True)
class Doctor:
    """Show versions, instruction sets and devices, and test the operators.

    Attributes:
        json: Print JSON.
    """

    json: bool = False

    def run(self, processes: Processes | None = None) -> Any:
        """Prints the report; returns the exit status."""
        from gradsafe import doctor

        return doctor.run(as_json=self.json)

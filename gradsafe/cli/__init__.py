"""The command line: `gradsafe` and `python -m gradsafe`."""

from gradsafe.cli.program import main

__all__ = ["main"]

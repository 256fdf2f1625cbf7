"""The command line: `gradsafe` and `python -m gradsafe`."""

from gradsafe._cli.program import main

__all__ = ["main"]

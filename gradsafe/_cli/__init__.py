"""The command line: `gradsafe` and `python -m gradsafe`."""

from gradsafe._cli.main import main

__all__ = ["main"]

"""gradsafe: safety tools from the gradients of language models, on one fused backend."""

from __future__ import annotations

from gradsafe import _backend, ops, reference
from gradsafe._version import __version__

__all__ = ["__version__", "ops", "reference"]

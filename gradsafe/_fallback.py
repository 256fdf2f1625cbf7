"""Slower or less exact paths are announced, and can be forbidden."""

from __future__ import annotations

import os
import threading
import warnings

_announced: set[str] = set()
_guard = threading.Lock()


class FallbackWarning(UserWarning):
    """A slower path is taken than the one that was meant."""


def announce_fallback(text: str) -> None:
    """Warn once per process and text; raise under GRADSAFE_STRICT=1.

    Args:
        text: What is done instead, and why.

    Raises:
        RuntimeError: GRADSAFE_STRICT is set.
    """
    if os.environ.get("GRADSAFE_STRICT", "0") not in ("", "0"):
        raise RuntimeError(f"{text} (refused: GRADSAFE_STRICT is set)")
    with _guard:
        new = text not in _announced
        _announced.add(text)
    if new:
        warnings.warn(text, FallbackWarning, stacklevel=3)

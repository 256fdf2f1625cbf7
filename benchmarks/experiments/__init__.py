"""Experiments that measure what the methods find, not how fast they are.

Some read published data sets (`data/NAME/*.jsonl`) or a small story model (`models/stories260k`)
from the folder that the environment variable GRADSAFE_EXPERIMENT_DATA names (default: `external` in
the repository). Without it they report what they skip.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTERNAL = Path(os.environ.get("GRADSAFE_EXPERIMENT_DATA", ROOT / "external"))

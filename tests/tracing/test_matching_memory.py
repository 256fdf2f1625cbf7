from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradsafe

SCRIPT = Path(__file__).with_name("matching_memory.py")
ALL_PAIRS = 400 * 60_000 * 4  # bytes of Q x N in float32


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_twice_the_queries_take_no_more_memory(tmp_path):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "index")],
        env={**os.environ, "PYTHONPATH": str(Path(gradsafe.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    start, once, twice = map(int, run.stdout.split())
    assert once - start < ALL_PAIRS / 2
    assert twice - once < ALL_PAIRS / 20

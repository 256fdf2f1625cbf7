"""Commands in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import gradsafe


class one_thread:
    """As torchrun sets it: the library's sums may differ with the number of threads."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(gradsafe.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run(
        [*start, str(count), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the command itself said on stderr."""
    return [line for line in done.stderr.splitlines() if line.startswith("gradsafe: ")]

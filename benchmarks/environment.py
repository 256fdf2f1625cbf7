"""The machine and the versions of a measurement, written into every CSV row."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

import gradsafe
from gradsafe._backend import _C

ROOT = Path(__file__).resolve().parents[1]


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


def _commit() -> str:
    """GRADSAFE_COMMIT, which names a copy; else git's short hash, with + if files differ."""
    if given := os.environ.get("GRADSAFE_COMMIT"):
        return given
    name = _git("rev-parse", "--short", "HEAD")
    if not name:
        return "unknown"
    return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.splitlines()[0]


@cache
def environment() -> dict[str, str]:
    """Date, commit, versions, hardware, instruction set."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "gradsafe": gradsafe.__version__,
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "isa": _C.cpu_isa(),
        "gpu": "",
        "driver": "",
        "nvcc": _C.build_info()["cuda_compiler"],
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver"] = _driver()
    return facts

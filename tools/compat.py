"""Runs part of the tests against the oldest and the newest dependencies: `make compat`.

"lowest" holds the versions of constraints/lowest.txt, "newest" whatever pip finds; the variable
TORCH says which PyTorch both get, so that the module that `make build` made fits. The environments
hold dependencies only and are kept in the user's cache folder, for all clones. They are
made anew when pyproject.toml, the constraints or TORCH change, and the newest every week.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOWEST = ROOT / "constraints" / "lowest.txt"
KINDS = ("lowest", "newest")
KEPT_DAYS = 14
# What touches transformers, PEFT, accelerate, TRL, bitsandbytes and torchao; the operators do not.
TESTS = (
    "tests/models",
    "tests/tracing/test_signature.py",
    "tests/detection/test_other_weights.py",
    "tests/detection/test_prefix.py",
    "tests/detection/test_quantised_weights.py",
    "tests/finetuning/test_sft_trainer.py",
    "tests/finetuning/test_cli_finetune.py",
    "tests/cli/test_packaged_model.py",
)


def main(kinds: list[str]) -> None:
    """Makes the environments that are missing and runs the tests in each."""
    torch = os.environ["TORCH"]
    if unknown := set(kinds) - set(KINDS):
        raise SystemExit(f"compat.py: expected some of {KINDS}, got {sorted(unknown)}")
    for kind in kinds or KINDS:
        python = environment(kind, torch)
        names = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "torchao")
        report = f"print(*(f'{{n}} {{metadata.version(n)}}' for n in {names}), sep=', ')"
        print(f"compat: {kind}:", flush=True)
        run(python, "-c", f"from importlib import metadata; {report}")
        # Nothing that gradsafe asks for is deprecated.
        run(python, "-W", "error::FutureWarning", "-m", "benchmarks.demo", "--testbed")
        run(python, "-m", "pytest", "-n", "auto", "--dist", "loadfile", *TESTS)


def run(*command: str) -> None:
    """Runs a command with this checkout's code; ends with its status if it fails."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    status = subprocess.run(command, cwd=ROOT, env=env).returncode
    if status:
        raise SystemExit(status)


def environment(kind: str, torch: str) -> str:
    """Path of the interpreter of an environment, which is made if need be."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(cache) / "gradsafe" / "compat"
    base.mkdir(parents=True, exist_ok=True)
    folder = base / f"{kind}-{key(kind, torch)}"
    complete = folder / ".complete"
    with locked(base / f"{folder.name}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            print(f"compat: installing {folder}", flush=True)
            install(folder, kind, torch)
        complete.touch()
    for old in base.glob(f"{kind}-*/.complete"):
        if time.time() - old.stat().st_mtime > KEPT_DAYS * 24 * 3600:
            shutil.rmtree(old.parent, ignore_errors=True)
    return str(folder / "bin" / "python")


def install(folder: Path, kind: str, torch: str) -> None:
    """Makes a virtual environment with the dependencies of the package and of its tests."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    pins = ["-c", LOWEST] if kind == "lowest" else []
    subprocess.run([*pip, *pins, torch, *requirements()], check=True)


def requirements() -> list[str]:
    """Dependencies of the package and of its tests, but for torch."""
    found = []
    for line in metadata.requires("gradsafe") or []:
        needed = Requirement(line)
        if needed.name != "torch" and (
            needed.marker is None or needed.marker.evaluate({"extra": "test"})
        ):
            extras = f"[{','.join(sorted(needed.extras))}]" if needed.extras else ""
            found.append(f"{needed.name}{extras}{needed.specifier}")
    return found


def key(kind: str, torch: str) -> str:
    """Changes with all that decides what is installed."""
    facts = [torch, sys.base_prefix, sys.version, *requirements()]
    facts.append(LOWEST.read_text() if kind == "lowest" else time.strftime("%G-%V"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main(sys.argv[1:])

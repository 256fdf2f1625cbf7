"""`pip install .` as often as one likes from one checkout: `make reinstall`.

Twice in an isolated build environment, whose tools are gone when the next one starts, and once
without isolation. Without optimisation and without CUDA, since only the way there is tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SELF_TEST = "import gradsafe.ops; print(gradsafe.__file__)"


def main() -> None:
    """Installs into temporary folders, and imports the module from each."""
    variables = {"GRADSAFE_CUDA": "off", "CMAKE_BUILD_TYPE": "Debug"}
    env = {**os.environ, **variables, "PYTHONPATH": ""}
    with tempfile.TemporaryDirectory() as temporary:
        pins = Path(temporary) / "build.txt"
        pins.write_text(os.environ["TORCH"] + "\n")
        isolated = ["--build-constraint", str(pins)]
        for name, options in (
            ("first", isolated),
            ("second", isolated),
            ("unisolated", ["--no-build-isolation"]),
        ):
            print(f"reinstall: {name} time", flush=True)
            target = Path(temporary) / name
            where = ["--no-deps", "--target", str(target)]
            pip = [sys.executable, "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, *options, *where, "."], cwd=ROOT, env=env, check=True)
            installed = subprocess.run(
                [sys.executable, "-c", SELF_TEST],
                cwd=temporary,
                env={**env, "PYTHONPATH": str(target)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            if not installed.startswith(str(target)):
                raise SystemExit(f"reinstall: imported {installed.strip()}, not from {target}")


if __name__ == "__main__":
    main()

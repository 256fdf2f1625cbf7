"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

`make sanitize` builds the module once for each of them in `build/sanitize-*`, beside a copy of the
Python files, and runs the operators' tests and the generated calls with it. Needs gcc on Linux.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# What each needs in the environment. libtorch is not instrumented: it leaks on purpose, and its
# threads are told to ThreadSanitizer in csrc/torch/parallel.h.
SANITIZERS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:halt_on_error=1"},
    "undefined": {"UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"},
}
PRELOADED = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
TESTS = ("tests/attack/test_operator_calls.py", "tests/ops")


def build(name: str) -> Path:
    """Returns the folder that holds the package with the sanitized module."""
    place = ROOT / "build" / f"sanitize-{name}"
    package = place / "gradsafe"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "gradsafe", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    flags = f"-fsanitize={name} -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
    command = [
        *(str(BIN / "cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(place / "cmake")),
        f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}",
        "-DCMAKE_BUILD_TYPE=None",
        f"-DCMAKE_CXX_FLAGS={flags}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DGRADSAFE_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DGRADSAFE_TORCH_VERSION={torch.__version__}",
        "-DGRADSAFE_CUDA=off",
        f"-DGRADSAFE_OUTPUT_DIR={package}",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([str(BIN / "cmake"), "--build", str(place / "cmake")], check=True)
    return place


def environment(name: str, place: Path) -> dict[str, str]:
    """Variables with which Python loads the runtime of a sanitizer before all others."""
    # libstdc++ too: AddressSanitizer looks for __cxa_throw when it starts, and Python is C.
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={library}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for library in (PRELOADED[name], "libstdc++.so")
    ]
    return {
        **os.environ,
        **SANITIZERS[name],
        "LD_PRELOAD": " ".join(found),
        "PYTHONPATH": str(place),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "4",  # more than one, also on a small machine
    }


def main() -> None:
    """Builds and tests; ends at the first finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SANITIZERS)}")
    parser.add_argument("--calls", type=int, default=2000, help="generated calls of each kind")
    options = parser.parse_args()
    for name in options.names or SANITIZERS:
        place = build(name)
        env = environment(name, place) | {"GRADSAFE_ATTACK_CALLS": str(options.calls)}
        shown = subprocess.run(
            [sys.executable, "-P", "-c", "import gradsafe._backend as b; print(b._C.__file__)"],
            env=env, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        if not shown.startswith(str(place)):
            raise SystemExit(f"sanitize: {name}: imported {shown}, not from {place}")
        print(f"sanitize: {name}", flush=True)
        # -s: a sanitizer reports to the standard error, and ends the process.
        # Without randomised addresses: they may lie where ThreadSanitizer keeps its own memory.
        fixed = ["setarch", "-R"] if name == "thread" else []
        pytest = [*fixed, sys.executable, "-P", "-m", "pytest", "-x", "-s", "-W", "ignore"]
        if code := subprocess.run([*pytest, *TESTS], env=env, cwd=ROOT).returncode:
            raise SystemExit(f"sanitize: {name}: exit status {code}")


if __name__ == "__main__":
    main()

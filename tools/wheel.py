"""Builds the wheel, checks what is in it, and imports it from a throw-away environment.

    python tools/wheel.py              with CUDA if nvcc is found, as `pip wheel .` does
    python tools/wheel.py --no-cuda    faster: the CPU module only

The module is built with pybind11, which does not support Python's limited API. So a wheel fits one
Python version and abi3audit has nothing to check. Checked instead: the module needs no C++ symbol
of torch (see `audit_binary`) and no library outside torch and the system's C and C++ runtime.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from audit_binary import ROOT, run, undefined_torch_symbols

LIBRARIES = re.compile(r"(libtorch_cpu|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)|ld-linux[^.]*)\.so")
# All files of these kinds in the package belong into the wheel.
SHIPPED = ("*.py", "*.j2", "py.typed")
FACTS = """
import json, gradsafe.ops
from gradsafe._backend import _C
print(json.dumps({**_C.build_info(), "module": _C.__file__, "package": gradsafe.__file__}))
"""


def build(folder: Path, cuda: bool) -> Path:
    """Builds the wheel into a folder, in this environment."""
    for stale in (ROOT / "build").glob("lib*"):  # setuptools would ship its old files
        shutil.rmtree(stale)
    variables = {} if cuda else {"GRADSAFE_CUDA": "off"}
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    call(folder, sys.executable, "-m", "pip", "wheel", *options, str(ROOT), **variables)
    (wheel,) = folder.glob("gradsafe-*.whl")
    return wheel


def facts_of(wheel: Path) -> dict[str, Any]:
    """Runs `twine check`, installs the wheel into a new environment and asks its module there."""
    environment = wheel.parent / "environment"
    venv.create(environment)
    python = str(environment / "bin" / "python")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    call(wheel.parent, *pip, "twine")
    call(wheel.parent, python, "-m", "twine", "check", "--strict", str(wheel))
    call(wheel.parent, *pip, "--no-deps", str(wheel))
    # The dependencies come from this environment; packages of the new one have priority.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    facts: dict[str, Any] = json.loads(call(wheel.parent, python, "-c", FACTS))
    return facts


def call(folder: Path, *command: str, **variables: str) -> str:
    """Runs a command outside the repository, whose package must not be found there."""
    environment = {**os.environ, **variables}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"wheel: {' '.join(command[:5])} ... failed\n{done.stdout}")
    return done.stdout


def content_problems(names: set[str]) -> Iterator[str]:
    """Files that are missing in the wheel or should not be there."""
    names = {name for name in names if ".dist-info/" not in name}
    module = {name for name in names if re.fullmatch(r"gradsafe/_C[^/]*\.(so|pyd)", name)}
    if len(module) != 1:
        yield f"expected one module gradsafe/_C*.so, got {sorted(module)}"
    package = ROOT / "gradsafe"
    expected = {str(path.relative_to(ROOT)) for kind in SHIPPED for path in package.rglob(kind)}
    yield from (f"lacks {name}" for name in sorted(expected - names))
    yield from (f"holds {name}" for name in sorted(names - expected - module))


def library_problems(module: Path) -> Iterator[str]:
    """Symbols and libraries that a user's machine may lack."""
    yield from undefined_torch_symbols(module)
    for line in run("readelf", "-d", str(module)).splitlines():
        needed = re.search(r"\(NEEDED\).*\[(.+)\]", line)
        if needed and not LIBRARIES.match(needed[1]):
            yield f"{module.name} needs the library {needed[1]}"
        path = re.search(r"\((?:RPATH|RUNPATH)\).*\[(.+)\]", line)
        if path and not all(part.startswith("$ORIGIN") for part in path[1].split(":")):
            yield f"{module.name} searches libraries in {path[1]}, a folder of this machine"


def cuda_problems(facts: dict[str, Any], cuda: bool) -> Iterator[str]:
    """CUDA may be absent only for a stated reason, and never although nvcc is there."""
    if not facts["cuda"] and not facts["cuda_reason"]:
        yield "has no CUDA kernels, and build_info() does not say why"
    off = not cuda or os.environ.get("GRADSAFE_CUDA", "").lower() == "off"
    if not facts["cuda"] and not off and shutil.which("nvcc"):
        yield f"has no CUDA kernels although nvcc was found: {facts['cuda_reason']}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--no-cuda", action="store_true", help="build with GRADSAFE_CUDA=off")
    cuda = not parser.parse_args().no_cuda
    with tempfile.TemporaryDirectory() as temporary:
        wheel = build(Path(temporary), cuda)
        facts = facts_of(wheel)
        problems = [
            *content_problems(set(zipfile.ZipFile(wheel).namelist())),
            *library_problems(Path(facts["module"])),
            *cuda_problems(facts, cuda),
        ]
        if not facts["package"].startswith(temporary):
            problems.append(f"was not imported, but {facts['package']}")
        size = wheel.stat().st_size / 1e6
    for problem in problems:
        print(f"wheel: {wheel.name} {problem}", file=sys.stderr)
    if not problems:
        reason = f"no CUDA kernels: {facts['cuda_reason']}"
        kernels = f"CUDA kernels for {facts['cuda_archs']}" if facts["cuda"] else reason
        print(f"wheel: {wheel.name} ({size:.1f} MB) is complete and imports; {kernels}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

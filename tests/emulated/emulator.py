"""Builds the CUDA kernels with g++ for the emulated grid (csrc/tests) and runs cases on them."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulated"
KEEP_SECONDS = 14 * 24 * 3600  # objects that were not used for so long are deleted
CXX = os.environ.get("CXX", "g++")
INCLUDES = ("csrc/tests", "csrc/include", "csrc/cuda")

# GPU kernels reinterpret memory freely, and fuse a * b + c only where they say fmaf.
COMMON = ("-std=c++17", "-g1", "-DGRADSAFE_EMULATE", "-ffp-contract=off", "-fno-strict-aliasing",
          "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi")  # fmt: skip
# "checked": every access is seen by the emulator itself (races, bounds, initialisation).
# "asan": the compiler's own memory checks, which also know each thread's local arrays.
FLAVOURS = {"checked": "thread", "asan": "address"}
SCHEDULES = ("forward", "reverse", "random:1")


class BugFound(AssertionError):
    """The emulated grid, or a sanitizer, reported a bug."""


@dataclass(frozen=True)
class Buffer:
    """Bytes for device memory, placed `offset` bytes past a 256-byte border."""

    data: bytes
    offset: int = 0


@dataclass
class Case:
    """One call of an entry of csrc/tests/cases."""

    name: str
    integers: list[int] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)


def buffer_of(tensor: Tensor) -> Buffer:
    """What lies between a view's first and last element, at the view's own alignment."""
    extent = 0
    if tensor.numel():
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((extent,), (1,))
    start = tensor.storage_offset() * tensor.element_size()
    return Buffer(flat.view(torch.uint8).numpy().tobytes(), start % 256)


# ---- running -------------------------------------------------------------------------------------
def _integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _encode(case: Case) -> bytes:
    name = case.name.encode()
    parts = [_integers(len(name)), name, _integers(len(case.integers), *case.integers)]
    parts.append(_integers(len(case.buffers)))
    for buffer in case.buffers:
        parts += [_integers(buffer.offset, len(buffer.data)), buffer.data]
    return b"".join(parts)


def _decode(data: bytes, cases: int) -> list[list[bytes]]:
    position = 0

    def integer() -> int:
        nonlocal position
        position += 8
        return int.from_bytes(data[position - 8 : position], "little")

    results: list[list[bytes]] = []
    for _ in range(cases):
        outputs = []
        for _ in range(integer()):
            size = integer()
            outputs.append(data[position : position + size])
            position += size
        results.append(outputs)
    return results


def run(
    program: Path,
    cases: Iterable[Case],
    schedules: Sequence[str] = SCHEDULES,
    device: Mapping[str, int] | None = None,
) -> list[list[bytes]]:
    """Outputs of every case, in the order in which its entry asked for them.

    Args:
        program: What `build` returns.
        cases: One after the other, each under every schedule.
        schedules: "forward", "reverse" or "random:<seed>".
        device: What launchers are told of it: CAPABILITY (80 or 90; 80 if left out), SMS (2),
            SHARED_KB (227).

    Raises:
        BugFound: with the report, at the first case in which something was found.
    """
    cases = list(cases)
    return _decode(_execute(program, cases, schedules, device)[0], len(cases))


def kernels(
    program: Path, cases: Iterable[Case], device: Mapping[str, int] | None = None
) -> list[str]:
    """Names of the kernels that the cases launch, in order."""
    return _execute(program, list(cases), SCHEDULES[:1], device)[1].splitlines()


def _execute(
    program: Path,
    cases: Sequence[Case],
    schedules: Sequence[str],
    device: Mapping[str, int] | None,
) -> tuple[bytes, str]:
    """What the program writes to its result file and to standard output."""
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=0"}
    options |= {f"GRADSAFE_EMULATED_{name}": str(n) for name, n in (device or {}).items()}
    with tempfile.TemporaryDirectory() as folder:
        problem, result = Path(folder, "problem"), Path(folder, "result")
        problem.write_bytes(b"".join(map(_encode, cases)))
        done = subprocess.run(
            [program, problem, result, *schedules],
            capture_output=True,
            text=True,
            env=os.environ | options,
            timeout=300,
        )
        if done.returncode != 0:
            raise BugFound(f"exit status {done.returncode}\n{done.stderr}")
        return result.read_bytes(), done.stdout


# ---- building ------------------------------------------------------------------------------------
def compiler_problem() -> str | None:
    """Why nothing can be emulated here, or None."""
    if shutil.which(CXX) is None:
        return f"the emulated grid needs a C++ compiler; {CXX} was not found"
    if not Path("/proc/self/exe").exists():
        return "the emulated grid runs on Linux only"
    return None


@functools.cache
def links_with(flag: str) -> bool:
    """Whether the compiler knows the flag and has the library that it needs."""
    command = [CXX, flag, "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(command, input="int main() {}", text=True, capture_output=True)
    return done.returncode == 0


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout


def _with_headers(source: Path, root: Path, seen: dict[Path, bytes]) -> None:
    """Adds a file and, recursively, what it includes by quotes."""
    if source in seen:
        return
    seen[source] = source.read_bytes()
    for name in re.findall(rb'^\s*#include "([^"]+)"', seen[source], re.MULTILINE):
        for folder in (source.parent, *(root / i for i in INCLUDES)):
            header = (folder / name.decode()).resolve()
            if header.exists():
                _with_headers(header, root, seen)
                break


def _object(source: Path, root: Path, flags: Sequence[str]) -> Path:
    """The compiled source, from the cache if it and its headers were compiled before."""
    seen: dict[Path, bytes] = {}
    _with_headers(source.resolve(), root, seen)
    digest = hashlib.sha256(_compiler_version().encode() + repr(flags).encode())
    for path in sorted(seen):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + seen[path] + b"\0")
    target = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}.o"
    includes = [f"-I{root / folder}" for folder in INCLUDES]
    _compile([*flags, *includes, "-x", "c++", "-c", source], target)
    target.touch()
    return target


def _compile(arguments: Sequence[str | Path], target: Path) -> None:
    """Makes a missing target, in one of several processes; it appears complete or not at all."""
    with (CACHE / f"{target.stem.partition('-')[0]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        partial = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([CXX, *arguments, "-o", partial], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"compiling {target.name} failed:\n{done.stderr}")
        if done.stderr:
            print(done.stderr)
        partial.replace(target)


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > KEEP_SECONDS
    except FileNotFoundError:  # another process has just completed or deleted it
        return False


def build(root: Path = ROOT, flavour: str = "checked", only: Sequence[str] | None = None) -> Path:
    """Path of the program `emulate`, with all kernels or those whose file stems are in `only`."""
    root = root.resolve()
    CACHE.mkdir(parents=True, exist_ok=True)
    for path in CACHE.iterdir():
        if _is_old(path):
            path.unlink(missing_ok=True)
    undefined = ["-fsanitize=undefined"] if links_with("-fsanitize=undefined") else []
    no_recover = "-fno-sanitize-recover=all"
    checks = (f"-fsanitize={FLAVOURS[flavour]}", *undefined, no_recover)
    plain, kernel = (*COMMON, "-O2"), (*COMMON, "-O1", *checks)
    globs = {"tests/emulator/*.cpp": plain, "tests/cases/*.cpp": plain}
    globs |= {"cuda/*.cu": kernel, "tests/cases/*.cu": kernel}
    jobs = [(s, flags) for g, flags in globs.items() for s in sorted((root / "csrc").glob(g))]
    if only is not None:
        wanted = {*only, "emulate"}
        jobs = [j for j in jobs if j[0].parent.name == "emulator" or j[0].stem in wanted]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda job: _object(job[0], root, job[1]), jobs))
    names = "\n".join(o.name for o in objects) + repr((flavour, undefined, _compiler_version()))
    program = CACHE / f"emulate-{flavour}-{hashlib.sha256(names.encode()).hexdigest()[:20]}"
    # ThreadSanitizer's own library is left out on purpose: see csrc/tests/emulator/hooks.cpp.
    libraries = [*undefined] if flavour == "checked" else list(checks)
    _compile([*objects, "-no-pie", *libraries], program)
    return program


def planted(folder: Path, edits: Iterable[tuple[str, str, str]]) -> Path:
    """A copy of csrc in `folder` with (file, old text, new text) replaced, each exactly once."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name, old, new in edits:
        path = folder / "csrc" / name
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{name} holds {text.count(old)} times, not once: {old!r}")
        path.write_text(text.replace(old, new))
    return folder


Runner = Callable[..., list[list[bytes]]]

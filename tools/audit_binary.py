"""Audits the built module: which symbols it needs, and which instructions its objects hold.

1. No C++ symbol of torch (at::, c10::, torch::) is undefined in it: only the stable C shims.
2. No AVX instruction in objects that must run everywhere, no AVX-512 in the AVX2 object.
3. No weak symbol in an instruction-set object: the linker could keep the wrong copy.
4. No torch, pybind or Python header is included by csrc/cpu, cuda, common or include.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_FREE = ("csrc/cpu", "csrc/cuda", "csrc/common", "csrc/include")
FORBIDDEN_INCLUDE = re.compile(r'#include\s*[<"](torch/|ATen/|c10/|pybind11/|Python\.h)')
PLAIN_OBJECTS = (
    "isa.cpp",
    "dispatch.cpp",
    "moments.cpp",
    "surgery.cpp",
    "subspace_surgery.cpp",
    "wgrad_moments.cpp",
    "cosine_topk.cpp",
    "level_scalar.cpp",
    "status.cpp",
)
AVX512 = re.compile(r"%zmm|%k[1-7]\b|%[xy]mm(1[6-9]|2\d|3[01])")
AVX = re.compile(r"%ymm|\sv(mov|add|mul|fmadd|xor|broadcast)\w*\s")


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def module_path() -> Path:
    import torch  # noqa: F401 - the module needs libtorch in the process

    spec = importlib.util.find_spec("gradsafe._C")
    if spec is None or spec.origin is None:
        raise SystemExit("audit: gradsafe._C is not built")
    return Path(spec.origin)


def objects() -> dict[str, Path]:
    folders = sorted(ROOT.glob("build/cmake-*"), key=lambda p: p.stat().st_mtime)
    if not folders:
        raise SystemExit("audit: no build folder; run `make build` first")
    found = {p.name.removesuffix(".o"): p for p in folders[-1].rglob("csrc/*/*.cpp.o")}
    return {name: path for name, path in found.items() if "gs_cpu.dir" in str(path)}


def undefined_torch_symbols(module: Path) -> Iterator[str]:
    for line in run("nm", "-D", "-C", "--undefined-only", str(module)).splitlines():
        if re.search(r"\b(at|c10|torch)::", line):
            yield f"{module.name} needs the C++ symbol {line.split(maxsplit=1)[1]}"


def leaked_instructions(name: str, path: Path) -> Iterator[str]:
    code = run("objdump", "-d", "--no-show-raw-insn", str(path))
    if name in PLAIN_OBJECTS and (AVX.search(code) or AVX512.search(code)):
        yield f"{name}: holds AVX instructions but must run on every machine"
    if name == "level_avx2.cpp" and AVX512.search(code):
        yield f"{name}: holds AVX-512 instructions"
    if name == "level_avx512.cpp" and not AVX512.search(code):
        yield f"{name}: holds no AVX-512 instruction; were its flags lost?"


def weak_symbols(name: str, path: Path) -> Iterator[str]:
    if not name.startswith("level_"):
        return
    for line in run("nm", "-C", str(path)).splitlines():
        if re.search(r"\s[WVu]\s", line):
            yield f"{name}: weak symbol {line.split(maxsplit=2)[-1]}"


def forbidden_includes() -> Iterator[str]:
    for folder in TORCH_FREE:
        for source in sorted((ROOT / folder).rglob("*")):
            if source.is_file() and FORBIDDEN_INCLUDE.search(source.read_text(encoding="utf-8")):
                yield f"{source.relative_to(ROOT)}: includes a torch, pybind or Python header"


def main() -> int:
    module = module_path()
    problems = [*undefined_torch_symbols(module), *forbidden_includes()]
    built = objects()
    for name in (*PLAIN_OBJECTS, "level_avx2.cpp", "level_avx512.cpp"):
        if name not in built:
            problems.append(f"{name}: not in the build folder")
            continue
        problems += [*leaked_instructions(name, built[name]), *weak_symbols(name, built[name])]
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    if not problems:
        print(f"audit: {module.name} and {len(built)} CPU objects are clean")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

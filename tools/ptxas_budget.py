"""Checks registers, shared memory and spills of every kernel, and the loads of the hot ones.

Needs no GPU. With cuobjdump the machine code of the built library is read (`--library`, by default
the newest below build/), else every .cu is compiled again and the loads go unchecked. Exits 1 if a
kernel spills or exceeds its budget; `--write` puts the tables into docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sass_gate

ROOT = Path(__file__).resolve().parents[1]
ARCHS = (80, 90)
HOPPER_ONLY = "wgrad_moments_sm90.cu"  # for sm_90a, in a library of its own
REGISTERS_PER_SM, THREADS_PER_SM = 65536, {80: 2048, 90: 2048}
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}
MOST_SHARED = 160 * 1024  # kernels that take what the device has to offer run as one block per SM

# Kernel name -> (threads per block, most registers, most static shared bytes, most dynamic ones).
# The register budget is what keeps enough blocks on an SM to hide memory latency.
BUDGETS = {
    "moments_tensor": (256, 128, 1024, 0),
    "moments_slices": (256, 128, 16384, 0),
    "finish_tensor": (1024, 64, 2048, 0),
    "finish_slices": (256, 64, 0, 0),
    "surgery_sums": (256, 64, 1024, 0),
    "finish_surgery": (1024, 64, 1024, 0),
    "surgery_merge": (256, 80, 0, 0),
    "advance_steps": (256, 64, 1024, 0),
    "surgery_adamw": (256, 80, 1024, 0),
    "subspace_sums": (256, 112, 2048, 0),
    "finish_subspace": (256, 64, 1024, 0),
    "subspace_merge": (256, 128, 1024, 0),
    "wgrad_moments_tile": (128, 255, 0, 112 * 1024),
    "finish_wgrad_tensor": (256, 64, 1024, 0),
    "finish_wgrad_slices": (256, 64, 0, 0),
    "cosine_norms": (256, 80, 0, 0),
    "cosine_pack_queries": (256, 32, 0, 0),
    "cosine_stream": (256, 168, 64, 0),
    "cosine_tiles": (256, 255, 0, 96 * 1024),
    "cosine_join_chunks": (256, 32, 0, 0),
    "cosine_select": (256, 80, 25 * 1024, 0),
    "wgrad_moments_wgmma": (384, 168, 1024, 226 * 1024),
    "kl_rows": (512, 64, 1024, 0),
    "kl_ring": (512, 64, 1024, 224 * 1024),
}


@dataclass(frozen=True)
class Usage:
    arch: int
    kernel: str
    template: str
    registers: int
    shared: int
    stack: int
    spills: int

    def blocks(self) -> int:
        """That fit an SM at once."""
        threads, _, _, dynamic = BUDGETS[self.kernel]
        per_block = -(-self.registers // 8) * 8 * threads
        return min(
            REGISTERS_PER_SM // max(per_block, 1),
            THREADS_PER_SM[self.arch] // threads,
            SHARED_PER_SM[self.arch] // max(self.shared + min(dynamic, MOST_SHARED) + 1024, 1),
        )

    def occupancy(self) -> float:
        return self.blocks() * BUDGETS[self.kernel][0] / THREADS_PER_SM[self.arch]


def find_cuobjdump() -> str | None:
    """On PATH, named by CUOBJDUMP, beside nvcc, or in the wheels of the CUDA tools."""
    if named := os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump"):
        return named
    folders = [Path(p) for p in sys.path]
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parents[1])
    for folder in folders:
        for found in (*folder.glob("bin/cuobjdump"), *folder.glob("nvidia/*/bin/cuobjdump")):
            return str(found)
    return None


@functools.cache
def demangle(name: str) -> tuple[str, str]:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"::(\w+)(<.*>)?\(", text)
    if match is None:
        raise SystemExit(f"ptxas_budget: cannot read the kernel name {text!r}")
    short = (match.group(2) or "").replace("gradsafe::", "").replace("(anonymous namespace)::", "")
    return match.group(1), short


def compile_one(nvcc: str, source: Path, arch: int) -> list[Usage]:
    name = f"{arch}a" if source.name == HOPPER_ONLY else str(arch)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc, "-cubin", f"-gencode=arch=compute_{name},code=sm_{name}", "-std=c++17", "-O3",
            "--expt-relaxed-constexpr",
            "-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage",
            "-I", str(ROOT / "csrc/include"), "-o", f"{folder}/out.cubin", str(source),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"ptxas_budget: nvcc failed on {source}\n{run.stderr}")
    usages, entry, frame = [], None, (0, 0)
    for line in run.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            entry = found.group(1)
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            frame = (int(found.group(1)), int(found.group(2)))
        elif (found := re.search(r"Used (\d+) registers", line)) and entry:
            shared = re.search(r"(\d+) bytes smem", line)
            kernel, template = demangle(entry)
            usages.append(
                Usage(arch, kernel, template, int(found.group(1)),
                      int(shared.group(1)) if shared else 0, *frame)
            )  # fmt: skip
            entry = None
    return usages


def read_library(cuobjdump: str, library: Path, arch: int, suffix: str = "") -> list[Usage]:
    """What the compiler has written into the built library."""
    run = subprocess.run(
        [cuobjdump, "-res-usage", "-arch", f"sm_{arch}{suffix}", str(library)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", run.stdout + run.stderr
    )
    reserved = 1024 if arch >= 90 else 0  # by the driver, and counted here
    return [
        Usage(
            arch,
            *demangle(name),
            int(registers),
            int(shared) - reserved * (int(shared) > 0),
            int(stack),
            int(local),
        )
        for name, registers, stack, shared, local in found
    ]


def built_library() -> Path | None:
    """The newest library of a build in this checkout, if no source is newer."""
    libraries = sorted(ROOT.glob("build/cmake-*/libgs_cuda.a"), key=lambda p: p.stat().st_mtime)
    sources = [p for kind in ("cu", "cuh", "h") for p in ROOT.glob(f"csrc/**/*.{kind}")]
    newest = max(p.stat().st_mtime for p in sources if "tests" not in p.parts)
    return libraries[-1] if libraries and libraries[-1].stat().st_mtime > newest else None


def problems_of(usages: list[Usage]) -> list[str]:
    problems = []
    for u in usages:
        name = f"sm_{u.arch} {u.kernel}{u.template}"
        if u.kernel not in BUDGETS:
            problems.append(f"{name}: no budget; add it to tools/ptxas_budget.py")
            continue
        _, registers, shared, _ = BUDGETS[u.kernel]
        if u.spills or u.stack:
            problems.append(f"{name}: {u.spills} bytes spilled, {u.stack} bytes of stack")
        if u.registers > registers:
            problems.append(f"{name}: {u.registers} registers, budget {registers}")
        if u.shared > shared:
            problems.append(f"{name}: {u.shared} bytes shared, budget {shared}")
    missing = BUDGETS.keys() - {u.kernel for u in usages}
    return problems + [f"{kernel}: has a budget but does not exist" for kernel in sorted(missing)]


def table_of(usages: list[Usage]) -> str:
    lines = ["| kernel | arch | variants | registers | most shared bytes | spills | occupancy |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for kernel in BUDGETS:
        for arch in ARCHS:
            group = [u for u in usages if u.kernel == kernel and u.arch == arch]
            if not group:
                continue
            registers = sorted(u.registers for u in group)
            worst = min(u.occupancy() for u in group)
            shared = max(u.shared for u in group) + BUDGETS[kernel][3]
            lines.append(
                f"| {kernel} | sm_{arch} | {len(group)} | {registers[0]} to {registers[-1]} | "
                f"{shared} | {sum(u.spills for u in group)} | "
                f">= {100 * worst:.0f} % |"
            )
    return "\n".join(lines)


def write_table(name: str, table: str) -> None:
    """Replaces what stands between the two marks of this name in docs/performance.md."""
    path = ROOT / "docs/performance.md"
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"ptxas_budget: {path} lacks the marks of {name!r}")
    path.write_text(f"{before}{begin}{table}\n{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, help="libgs_cuda.a, or an object file or cubin")
    parser.add_argument("--write", action="store_true", help="put the tables into the docs")
    arguments = parser.parse_args()
    nvcc, cuobjdump = shutil.which("nvcc"), find_cuobjdump()
    library = arguments.library or built_library()
    loads: list[sass_gate.Loads] = []
    if cuobjdump and library:
        usages = [u for arch in ARCHS for u in read_library(cuobjdump, library, arch)]
        usages += read_library(cuobjdump, library.with_name("libgs_cuda_sm90.a"), 90, "a")
        blocks = {(u.arch, u.kernel + u.template): u.blocks() for u in usages}
        for arch in ARCHS:
            loads += sass_gate.loads_of(cuobjdump, library, arch, demangle, blocks)
    elif nvcc is None:
        print("ptxas_budget: SKIPPED, no nvcc on PATH")
        return 0
    else:
        why = "no built library is up to date" if cuobjdump else "no cuobjdump"
        print(f"ptxas_budget: loads are NOT CHECKED: {why}")
        sources = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
        jobs = [
            (nvcc, source, arch)
            for source in sources
            for arch in ((90,) if source.name == HOPPER_ONLY else ARCHS)
        ]
        with ThreadPoolExecutor(2) as pool:
            usages = [u for group in pool.map(lambda job: compile_one(*job), jobs) for u in group]
    problems = problems_of(usages) + (sass_gate.problems_of(loads) if loads else [])
    for problem in problems:
        print(f"ptxas_budget: {problem}", file=sys.stderr)
    if not problems:
        print(
            f"ptxas_budget: {len(usages)} kernels for sm_80 and sm_90, 0 spills, all in budget; "
            f"{len(loads)} of them with their loads"
        )
    if arguments.write:
        write_table("ptxas", table_of(usages))
        if loads:
            write_table("loads", sass_gate.table_of(loads))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

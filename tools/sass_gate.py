"""The loads of the hot kernels: how many are on their way at once, and what an element costs.

Part of tools/ptxas_budget.py. Spills and registers cannot show that loads wait for each other: the
machine code can.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sass

WIDTH = {"float": 4, "bf16": 2, "f16": 2, "f8": 1}  # bytes of an element
# Bytes per thread: four loads of 16 bytes. On sm_80, f8 is converted by hand and takes registers.
LEAST_IN_FLIGHT = {80: 48, 90: 64}
MOST_SHARED = 224 * 1024  # bytes that copies to shared memory can have on their way
LEAST_PER_SM = {80: 24 * 1024, 90: 32 * 1024}  # bytes, which keep an SM's share of HBM busy


@dataclass(frozen=True)
class Gate:
    """What a hot kernel must keep to.

    Attributes:
        threads: Per block.
        lists: Lists that are read, where the kernel serves every dtype; 0: the template names them.
        most: Instructions per element of the costliest variant, rarely taken branches included.
    """

    threads: int
    lists: int
    most: float


GATES = {
    "moments_tensor": Gate(256, 0, 45),
    "moments_slices": Gate(256, 0, 60),
    "surgery_sums": Gate(256, 2, 10),
    "surgery_merge": Gate(256, 2, 8),
    "surgery_adamw": Gate(256, 5, 48),
    "kl_ring": Gate(512, 0, 105),
}


@dataclass(frozen=True)
class Loads:
    """The main loops of one variant of a kernel."""

    arch: int
    kernel: str
    template: str
    in_flight: int  # bytes per thread, the least of its main loops
    per_sm: int  # bytes of the blocks that fit an SM
    instructions: float  # per element, the most of its main loops


def _element_bytes(gate: Gate, template: str, body: list[sass.Instruction]) -> int:
    """Bytes that are read for one element of the result."""
    if gate.lists:
        narrow = any(i.opcode == "HADD2.F32" or "0xffff0000" in i.operands for i in body)
        return gate.lists * (2 if narrow else 4)
    types = re.findall(r"float|bf16|f16|f8", template)
    refs = re.search(r", (\d+)>", template)
    if refs:  # moments: gradient, reference, number of references
        return WIDTH[types[0]] + int(refs.group(1)) * WIDTH[types[1]]
    return sum(WIDTH[t] for t in types)


def _main_loops(gate: Gate, function: sass.Function) -> list[tuple[list, sass.Loop]]:
    """Without the loops that take what an unrolled one has left over."""
    measured = [(body, sass.measure(body)) for body in function.loops()]
    measured = [(body, loop) for body, loop in measured if loop.loads and loop.in_flight]
    most = max((loop.bytes_loaded for _, loop in measured), default=0)
    return [m for m in measured if gate.lists or m[1].bytes_loaded == most]


def loads_of(
    cuobjdump: str,
    library: Path,
    arch: int,
    demangle: Callable[[str], tuple[str, str]],
    blocks: dict[tuple[int, str], int],
) -> list[Loads]:
    """Measures every hot kernel of the library; `blocks` of each fit an SM."""
    found = []
    for function in sass.functions(cuobjdump, library, arch, GATES):
        kernel, template = demangle(function.symbol)
        if kernel not in GATES:
            continue
        gate = GATES[kernel]
        loops = _main_loops(gate, function)
        in_flight = min((loop.in_flight for _, loop in loops), default=0)
        in_flight = min(in_flight, MOST_SHARED // gate.threads // 16 * 16)
        costs = [
            loop.instructions * _element_bytes(gate, template, body) / loop.bytes_loaded
            for body, loop in loops
        ]
        per_sm = in_flight * gate.threads * blocks[arch, kernel + template]
        cost = max(costs, default=0.0)
        found.append(Loads(arch, kernel, template, in_flight, per_sm, cost))
    return found


def problems_of(loads: list[Loads]) -> list[str]:
    problems = []
    for u in loads:
        name = f"sm_{u.arch} {u.kernel}{u.template}"
        if u.in_flight < LEAST_IN_FLIGHT[u.arch]:
            problems.append(f"{name}: {u.in_flight} bytes in flight per thread")
        if u.per_sm < LEAST_PER_SM[u.arch]:
            problems.append(f"{name}: {u.per_sm} bytes in flight per SM")
        if u.instructions > GATES[u.kernel].most:
            problems.append(f"{name}: {u.instructions:.1f} instructions per element")
    missing = GATES.keys() - {u.kernel for u in loads}
    return problems + [f"{kernel}: has a gate but does not exist" for kernel in sorted(missing)]


def table_of(loads: list[Loads]) -> str:
    lines = ["| kernel | arch | 16-byte loads in flight per thread | KB in flight per SM | "
             "instructions per element |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for kernel, arch in sorted(
        {(u.kernel, u.arch) for u in loads}, key=lambda k: (list(GATES).index(k[0]), k[1])
    ):
        group = [u for u in loads if (u.kernel, u.arch) == (kernel, arch)]
        flying = sorted(u.in_flight / 16 for u in group)
        held = sorted(u.per_sm / 1024 for u in group)
        costs = sorted(u.instructions for u in group)
        lines.append(
            f"| {kernel} | sm_{arch} | {flying[0]:g} to {flying[-1]:g} | {held[0]:.0f} to "
            f"{held[-1]:.0f} | {costs[0]:.1f} to {costs[-1]:.1f} |"
        )
    return "\n".join(lines)

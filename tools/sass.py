"""Reads what `cuobjdump -sass` prints: loops, their loads, and when these are used."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

VECTOR_LOADS = {"LDG": (8, 16), "LDGSTS": (16,)}  # instruction: widths in bytes that count
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def load_bytes(self) -> int:
        """Bytes per thread of a global load that may be waited for later, else 0."""
        if self.name not in VECTOR_LOADS:
            return 0
        width = re.search(r"\.(\d+)\b", self.opcode)
        size = int(width.group(1)) // 8 if width else 4
        return size if size in VECTOR_LOADS[self.name] else 0

    @property
    def target(self) -> int | None:
        """Where a branch goes, if it is one with a fixed target."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name == "BRA" else None
        return int(found.group(1), 16) if found else None

    def loaded(self) -> set[int]:
        """Registers that a load fills."""
        found = REGISTER.search(self.operands)
        if self.name != "LDG" or found is None:
            return set()
        first = int(found.group(1))
        return set(range(first, first + max(self.load_bytes // 4, 1)))

    def used(self) -> set[int]:
        """Registers that are read; of wider operands only the first, which is enough here."""
        operands = self.operands
        if self.name not in ("STG", "STS", "STL", "ST", "BRA"):  # the first one is written
            operands = operands.partition(",")[2]
        return {int(n) for n in REGISTER.findall(operands)}


@dataclass
class Function:
    """The machine code of one kernel for one architecture."""

    arch: int
    symbol: str
    code: list[Instruction] = field(default_factory=list)

    def loops(self) -> list[list[Instruction]]:
        """Innermost loops with vector loads."""
        spans = {
            (i.target, i.address)
            for i in self.code
            if i.target is not None and i.target < i.address
        }
        bodies = {span: [i for i in self.code if span[0] <= i.address <= span[1]] for span in spans}
        loading = {s: b for s, b in bodies.items() if any(i.load_bytes for i in b)}
        inner = [
            body
            for (begin, end), body in loading.items()
            if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loading)
        ]
        return sorted(inner, key=lambda body: body[0].address)


@dataclass(frozen=True)
class Loop:
    """What counts of one loop."""

    instructions: int
    loads: int  # of 16 bytes
    bytes_loaded: int  # per thread and iteration
    in_flight: int  # most bytes per thread that are asked for before the first of them is used


def measure(body: list[Instruction]) -> Loop:
    if any(i.name == "LDGSTS" for i in body):
        return _measure_copies(body)
    loads = [i.load_bytes for i in body if i.load_bytes]
    flying = max(_asked_for(body, start) for start in range(len(body)))
    return Loop(len(body), loads.count(16), sum(loads), flying)


def _measure_copies(body: list[Instruction]) -> Loop:
    """cp.async: every wait says how many groups may still be on their way; 0 without a wait."""
    copies = [i for i in body if i.name == "LDGSTS"]
    whole = [i for i in copies if "ZFILL" not in i.opcode]  # without the variant for ragged ends
    counted = whole or copies
    group = most = 0
    for i in body:
        group = 0 if i.name == "LDGDEPBAR" else group + (i in counted)
        most = max(most, group)
    waits = [re.search(r"0x([0-9a-f]+)\s*$", i.operands) for i in body if i.name == "DEPBAR"]
    pending = max((int(w.group(1), 16) for w in waits if w), default=0)
    return Loop(len(body), most, 16 * most, 16 * most * pending)


def _asked_for(body: list[Instruction], start: int) -> int:
    """Bytes that are asked for from `start` on, round the loop, until one of them is used."""
    outstanding: set[int] = set()
    total = 0
    for instruction in body[start:] + body[:start]:
        if instruction.used() & outstanding:
            break
        if instruction.load_bytes:
            total += instruction.load_bytes
            outstanding |= instruction.loaded()
    return total


def functions(cuobjdump: str, binary: Path, arch: int, names: Iterable[str]) -> Iterator[Function]:
    """Kernels of an object, library or cubin for the architecture whose symbols hold a name."""
    names = tuple(names)
    command = [cuobjdump, "-sass", "-arch", f"sm_{arch}", str(binary)]
    current: Function | None = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:  # a library prints hundreds of megabytes
            if found := re.search(r"Function : (\S+)", line):
                if current is not None:
                    yield current
                wanted = any(name in found.group(1) for name in names)
                current = Function(arch, found.group(1)) if wanted else None
            elif current is not None and (found := INSTRUCTION.search(line)):
                current.code.append(Instruction(int(found.group(1), 16), *found.group(2, 3)))
    if current is not None:
        yield current
    if run.returncode:
        raise SystemExit(f"sass: {' '.join(command)} failed with exit status {run.returncode}")

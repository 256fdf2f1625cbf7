"""Which of a build's machine code a GPU runs, and what to do where there is none."""

from __future__ import annotations

import re
from typing import NamedTuple

OLDEST = 80  # the kernels need cp.async and bfloat16 mma
_ARCH = re.compile(r"(\d+)([af]?)(-real|-virtual)?")


class DeviceCode(NamedTuple):
    """What a GPU runs: the code, or why there is none and what to do."""

    usable: bool
    text: str


def device_code(archs: str, major: int, minor: int) -> DeviceCode:
    """Which code a GPU of compute capability `major.minor` runs, as the CUDA driver chooses.

    Machine code runs on GPUs of the same major and the same or a higher minor version, so sm_80
    runs on sm_86 and sm_89. PTX is compiled for any later GPU when a kernel is first used. A suffix
    "a" binds code to one version, "f" to a family: the same major version.

    `archs` are architectures as CMake writes them, separated by spaces or semicolons: "80-real 90"
    is machine code for 8.0, and machine code and PTX for 9.0.
    """
    here = 10 * major + minor
    if here < OLDEST:
        return DeviceCode(
            False,
            f"none: sm_{here} is older than sm_{OLDEST}, which the kernels need; move the tensors "
            "to the CPU, where every operator runs",
        )
    machine, portable = [], []
    for arch in archs.replace(";", " ").split():
        match = _ARCH.fullmatch(arch)
        if match is None:  # "native", "all": only the compiler knows
            return DeviceCode(True, f"unknown: built for {archs!r}")
        number, suffix, kind = int(match[1]), match[2], match[3]
        same_major = number // 10 == major and number <= here
        fits = number == here if suffix == "a" else same_major
        if kind != "-virtual" and fits:
            machine.append((number == here, number, suffix))
        if kind != "-real" and (number <= here if not suffix else fits):
            portable.append((number, suffix))
    if machine:
        exact, number, suffix = max(machine)
        return DeviceCode(
            True, f"machine code for sm_{number}{suffix}" + ("" if exact else ", the same family")
        )
    if portable:
        number, suffix = max(portable)
        return DeviceCode(
            True,
            f"PTX for compute_{number}{suffix}, compiled when a kernel is first used: slower to "
            f"start; rebuild with GRADSAFE_CUDA_ARCHS={here}-real for machine code",
        )
    return DeviceCode(
        False,
        f"none: the build holds code for {archs}, and nothing of it runs on sm_{here}; rebuild "
        f"with GRADSAFE_CUDA_ARCHS={here}-real",
    )


def driver_problem(driver: int, runtime: int) -> str | None:
    """Why the driver cannot run the linked CUDA runtime, or None.

    Versions are numbers as of `cuDriverGetVersion`, 12080 for 12.8; 0 for no driver or no runtime.
    """
    # Within a major version an older driver runs newer programs.
    if driver == 0 or runtime == 0 or driver // 1000 >= runtime // 1000:
        return None
    return (
        f"the GPU driver supports CUDA {version(driver)} and gradsafe was built with the runtime "
        f"of CUDA {version(runtime)}; update the driver, or rebuild with the nvcc of CUDA "
        f"{driver // 1000}"
    )


def version(number: int) -> str:
    """13000 as "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"

"""What this installation can do and why, and whether its operators compute the right numbers."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from gradsafe import ops
from gradsafe._backend import _C, cuda_problem
from gradsafe._version import __version__
from gradsafe.device_code import device_code, version
from gradsafe.doctor_cases import CASES
from gradsafe.ops import _default as reference

_TOLERANCE = 1e-5  # of the largest value: far above float32 sums, far below any wrong formula
_SETTINGS = ("GRADSAFE_FORCE_ISA", "GRADSAFE_STRICT", "GRADSAFE_CACHE", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Check:
    """One operator, compared with its plain PyTorch definition in float64.

    Attributes:
        name: Operator and where it ran, for example "moments on cpu/avx512".
        ok: Whether the numbers agree.
        error: Largest deviation over the largest value, None if the operator raised.
        detail: What went wrong, empty if nothing did.
    """

    name: str
    ok: bool
    error: float | None
    detail: str = ""


def run(as_json: bool = False) -> int:
    """Prints the report.

    Args:
        as_json: Machine-readable output.

    Returns:
        Exit status: 0 if every check passed, else 1.
    """
    facts = collect()
    checks = self_test()
    ok = all(check.ok for check in checks)
    if as_json:
        print(json.dumps({**facts, "checks": [asdict(check) for check in checks], "ok": ok}))
    else:
        print(render(facts, checks))
    return 0 if ok else 1


def collect() -> dict[str, Any]:
    """Gathers versions, instruction sets, the CUDA state with its reason, threads and settings."""
    build = dict(_C.build_info())
    problem = cuda_problem()
    return {
        "versions": {
            "gradsafe": __version__,
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            "safetensors": _version("safetensors"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "build": build,
        "cpu": {
            "isa": _C.cpu_isa(),
            "isa_available": list(_C.cpu_isas()),
            "bf16_pairs": _C.has_bf16_pairs(),
            "isa_forced": os.environ.get("GRADSAFE_FORCE_ISA") or None,
            "threads": torch.get_num_threads(),
            "cores": _cores(),
        },
        "cuda": {
            "built": bool(build["cuda"]),
            "usable": problem is None,
            "problem": problem,
            "torch_cuda": torch.version.cuda,
            "versions": dict(zip(("driver", "runtime"), _C.cuda_versions(), strict=True)),
            "devices": _devices(build["cuda_archs"]) if problem is None else [],
        },
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def self_test() -> list[Check]:
    """Compares every operator with its definition, on each instruction set and on CUDA."""
    checks = []
    in_use = _C.cpu_isa()
    try:
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            checks += [_check(operator, "cpu", f"cpu/{isa}") for operator in CASES]
    finally:
        _C.set_cpu_isa(in_use)
    if cuda_problem() is None:
        for index, found in enumerate(_devices(_C.build_info()["cuda_archs"])):
            if found["usable"]:
                device = f"cuda:{index}"
                checks += [_check(operator, device, device) for operator in CASES]
            else:
                checks.append(Check(f"operators on cuda:{index}", False, None, found["code"]))
    return checks


def render(facts: dict[str, Any], checks: list[Check]) -> str:
    """Lays the report out for people."""
    versions, build, cpu, cuda = (facts[key] for key in ("versions", "build", "cpu", "cuda"))
    available = ", ".join(cpu["isa_available"])
    pairs = " with bfloat16 pairs" if cpu["bf16_pairs"] else ""
    forced = f", forced by GRADSAFE_FORCE_ISA={cpu['isa_forced']}" if cpu["isa_forced"] else ""
    rows = [
        ("gradsafe", versions["gradsafe"]),
        (
            "torch",
            f"{versions['torch']} (built against {build['torch_built_with']}, runs on "
            f"{build['torch_target']} and later)",
        ),
        ("transformers", versions["transformers"]),
        ("safetensors", versions["safetensors"]),
        ("python", versions["python"]),
        ("platform", versions["platform"]),
        ("compiler", build["compiler"]),
        ("CPU kernels", f"{cpu['isa']}{pairs}{forced}; available: {available}"),
        ("threads", f"{cpu['threads']} of {cpu['cores']} cores"),
        (
            "CUDA kernels",
            f"built by {build['cuda_compiler']} for {build['cuda_archs']}"
            if cuda["built"]
            else f"not built: {build['cuda_reason']}",
        ),
        *_device_rows(cuda),
        *(
            [("CUDA versions", ", ".join(f"{k} {version(v)}" for k, v in cuda["versions"].items()))]
            if cuda["versions"]["driver"]
            else []
        ),
        *((name, value) for name, value in facts["settings"].items()),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    lines += ["", "self-test against the plain PyTorch definition (float64)"]
    wide = max((len(check.name) for check in checks), default=0) + 2
    for check in checks:
        shown = "" if check.error is None else f"error {check.error:.0e}"
        lines.append(
            f"  {'ok  ' if check.ok else 'FAIL'}  {check.name:<{wide}}{shown}"
            + (f"  {check.detail}" if check.detail else "")
        )
    failed = sum(not check.ok for check in checks)
    lines.append(f"{len(checks) - failed} of {len(checks)} checks passed")
    return "\n".join(lines)


def _check(operator: str, device: str, where: str) -> Check:
    name = f"{operator} on {where}"
    case = CASES[operator]
    try:
        found = case(ops, device)
        again = case(ops, device)
        expected = case(reference, "cpu")
    except Exception as error:  # whatever it is, it is the finding
        return Check(name, False, None, f"{type(error).__name__}: {error}")
    repeats = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    errors = [_deviation(f.cpu(), e) for f, e in zip(found, expected, strict=True)]
    if not all(math.isfinite(error) for error in errors):
        return Check(name, False, None, "the result is not finite")
    worst = max(errors)
    if worst > _TOLERANCE:
        return Check(name, False, worst, f"more than {_TOLERANCE:.0e}")
    return Check(name, repeats, worst, "" if repeats else "two calls disagree")


def _deviation(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what this process may use, where the system tells
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices(archs: str) -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        code = device_code(archs, facts.major, facts.minor)
        devices.append(
            {
                "name": facts.name,
                "architecture": f"sm_{facts.major}{facts.minor}",
                "memory_GiB": round(facts.total_memory / 2**30),
                "usable": code.usable,
                "code": code.text,
            }
        )
    return devices


def _device_rows(cuda: dict[str, Any]) -> list[tuple[str, str]]:
    if not cuda["devices"]:
        return [("CUDA device", f"none usable: {cuda['problem']}")]
    rows = []
    for index, found in enumerate(cuda["devices"]):
        name = f"{found['name']} ({found['architecture']}, {found['memory_GiB']} GiB)"
        rows += [(f"CUDA device {index}", name), ("  runs", found["code"])]
    return rows

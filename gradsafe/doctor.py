"""What this installation can do and why, and whether its operators compute the right numbers."""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from gradsafe import ops
from gradsafe._backend import _C, cuda_problem, fallback_reason
from gradsafe._fallback import FallbackWarning
from gradsafe._version import __version__
from gradsafe.device_code import device_code, version
from gradsafe.doctor_cases import CASES
from gradsafe.ops import _default as reference

_TOLERANCE = 1e-5  # of the largest value: far above float32 sums, far below any wrong formula
_SETTINGS = [f"GRADSAFE_{name}" for name in ("BACKEND", "FORCE_ISA", "STRICT", "CACHE")]
_SETTINGS += ["OMP_NUM_THREADS"]


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
    """Prints the report, as JSON or for people; returns 0 if every check passed, else 1."""
    report = examine()
    print(json.dumps(report) if as_json else render(report))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """The whole report as plain values: `collect()`, the checks, and whether all passed."""
    checks = self_test()
    ok = all(check.ok for check in checks)
    return {**collect(), "checks": [asdict(check) for check in checks], "ok": ok}


def collect() -> dict[str, Any]:
    """Gathers versions, instruction sets, the CUDA state with its reason, threads and settings."""
    problem = cuda_problem()
    build = {} if _C is None else dict(_C.build_info())
    driver, runtime = (0, 0) if _C is None else _C.cuda_versions()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": {
            "gradsafe": __version__,
            "torch": torch.__version__,
            **{package: _version(package) for package in ("transformers", "safetensors")},
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "fallback": fallback_reason or None,
        "build": build,
        "cpu": {
            "isa": None if _C is None else _C.cpu_isa(),
            "isa_available": [] if _C is None else list(_C.cpu_isas()),
            "bf16_pairs": _C is not None and _C.has_bf16_pairs(),
            "isa_forced": os.environ.get("GRADSAFE_FORCE_ISA") or None,
            "threads": torch.get_num_threads(),
            "cores": cores or 1,
        },
        "cuda": {
            "built": bool(build.get("cuda")),
            "usable": problem is None,
            "problem": problem,
            "torch_cuda": torch.version.cuda,
            "versions": {"driver": driver, "runtime": runtime},
            "devices": _devices(build.get("cuda_archs")) if problem is None else [],
        },
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def self_test() -> list[Check]:
    """Compares every operator with its definition, on each instruction set and on CUDA."""
    checks = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # the report says it
        if _C is None:
            checks += [_check(operator, "cpu", "cpu/default") for operator in CASES]
        else:
            in_use = _C.cpu_isa()
            try:
                for isa in _C.cpu_isas():
                    _C.set_cpu_isa(isa)
                    checks += [_check(operator, "cpu", f"cpu/{isa}") for operator in CASES]
            finally:
                _C.set_cpu_isa(in_use)
        for index, found in enumerate(collect()["cuda"]["devices"]):
            device = f"cuda:{index}"
            if found["usable"]:
                checks += [_check(operator, device, device) for operator in CASES]
            else:
                checks.append(Check(f"operators on {device}", False, None, found["code"]))
    return checks


def render(report: dict[str, Any]) -> str:
    """Lays the report of `examine` out for people."""
    versions, build, cpu, cuda = (report[key] for key in ("versions", "build", "cpu", "cuda"))
    rows = list(versions.items())
    if report["fallback"]:
        rows.append(("operators", f"plain PyTorch definitions (slow): {report['fallback']}"))
    else:
        rows[1] = (
            "torch",
            f"{versions['torch']} (built against {build['torch_built_with']}, runs on "
            f"{build['torch_target']} and later)",
        )
        pairs = " with bfloat16 pairs" if cpu["bf16_pairs"] else ""
        forced = f", forced by GRADSAFE_FORCE_ISA={cpu['isa_forced']}" if cpu["isa_forced"] else ""
        isas = f"{cpu['isa']}{pairs}{forced}; available: {', '.join(cpu['isa_available'])}"
        kernels = f"built by {build['cuda_compiler']} for {build['cuda_archs']}"
        rows += [
            ("compiler", build["compiler"]),
            ("CPU kernels", isas),
            ("CUDA kernels", kernels if cuda["built"] else f"not built: {build['cuda_reason']}"),
        ]
    rows.append(("threads", f"{cpu['threads']} of {cpu['cores']} cores"))
    for index, device in enumerate(cuda["devices"]):
        name = f"{device['name']} ({device['architecture']}, {device['memory_GiB']} GiB)"
        rows += [(f"CUDA device {index}", name), ("  runs", device["code"])]
    if not cuda["devices"]:
        rows.append(("CUDA device", f"none usable: {cuda['problem']}"))
    if cuda["versions"]["driver"]:
        named = (f"{name} {version(number)}" for name, number in cuda["versions"].items())
        rows.append(("CUDA versions", ", ".join(named)))
    rows += report["settings"].items()
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    lines += ["", "self-test against the plain PyTorch definition (float64)"]
    checks = report["checks"]
    wide = max((len(check["name"]) for check in checks), default=0) + 2
    for check in checks:
        error = "" if check["error"] is None else f"error {check['error']:.0e}"
        line = f"  {'ok  ' if check['ok'] else 'FAIL'}  {check['name']:<{wide}}{error}"
        lines.append(line + (f"  {check['detail']}" if check["detail"] else ""))
    lines.append(f"{sum(check['ok'] for check in checks)} of {len(checks)} checks passed")
    return "\n".join(lines)


def _check(operator: str, device: str, where: str) -> Check:
    name = f"{operator} on {where}"
    case = CASES[operator]
    try:
        found, again, expected = case(ops, device), case(ops, device), case(reference, "cpu")
    except Exception as error:  # the report names it
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


def _devices(archs: str | None) -> list[dict[str, Any]]:
    """Facts about every GPU; `archs` is None where the operators are plain PyTorch."""
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        usable, code = True, "plain PyTorch"
        if archs is not None:
            usable, code = device_code(archs, facts.major, facts.minor)
        devices.append(
            {
                "name": facts.name,
                "architecture": f"sm_{facts.major}{facts.minor}",
                "memory_GiB": round(facts.total_memory / 2**30),
                "usable": usable,
                "code": code,
            }
        )
    return devices

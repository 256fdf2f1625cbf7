"""What this installation can do and why, and whether its operators compute the right numbers."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gradsafe import ops, reference
from gradsafe._backend import _C, cuda_problem
from gradsafe._version import __version__

_TOLERANCE = 1e-5  # of the largest value: far above float32 sums, far below any wrong formula
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


# A case calls one operator of `gradsafe.ops` or its namesake in `gradsafe.reference`.
Case = Callable[[ModuleType, str], list[Tensor]]


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
            "devices": _devices() if problem is None else [],
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
        checks += [_check(operator, "cuda", "cuda") for operator in CASES]
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
        ("CUDA device", ", ".join(cuda["devices"]) or f"none usable: {cuda['problem']}"),
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


def _moments(module: ModuleType, device: str) -> list[Tensor]:
    # Odd widths leave a tail behind every vector width; the offset keeps all sums away from zero.
    shapes = [(33, 517), (8, 64), (1, 1031)]
    found = []
    for dtype in _DTYPES:
        grads = [_noise(shape, seed, dtype, device) for seed, shape in enumerate(shapes)]
        refs = [[_noise(shape, seed, dtype, device) for seed in (8, 9)] for shape in shapes]
        rows, columns = module.moments(grads, refs, axis="both")
        found += [*_sums(rows), *_sums(columns), *_sums(module.moments(grads, refs))]
    return found


def _wgrad_moments(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        x, dy = _noise((3, 9, 65), 0, dtype, device), _noise((3, 9, 37), 1, dtype, device)
        lengths = [9, 1, 4]
        for sample, length in enumerate(lengths):  # padding must not be read
            x[sample, length:] = dy[sample, length:] = float("nan")
        refs = [_noise((37, 65), seed, dtype, device) for seed in (8, 9)]
        rows, columns = module.wgrad_moments(x, dy, refs, axis="both", lengths=lengths)
        whole = module.wgrad_moments(x, dy, refs, lengths=lengths)
        found += [*_sums(rows), *_sums(columns), *_sums(whole)]
    return found


def _cosine_topk(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        queries, rows = _noise((5, 517), 0, dtype, device), _noise((131, 517), 1, dtype, device)
        rows[7] = 0
        found += [*module.cosine_topk(queries, rows, 9, start=3)]
        found += [*module.cosine_topk(queries, rows.float(), 131)]
    return found


def _surgery(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        user, align = _conflict(dtype, device)
        found.append(module.surgery_(user, align, 0.5))
        # A 16-bit rounding may fall either way on the last bit of the coefficient.
        found += user if dtype == torch.float32 else []
    return found


def _surgery_sums(module: ModuleType, device: str) -> list[Tensor]:
    return [module.surgery_sums(*_conflict(dtype, device), [0, 1, 0]) for dtype in _DTYPES]


def _surgery_merge(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        user, align = _conflict(dtype, device)
        sums = torch.tensor([-2.0, 3.0, 4.0], dtype=torch.float64, device=device)
        found += [module.surgery_merge_(user, align, sums, 0.5), *user]
    return found


def _surgery_adamw(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        user, align = _conflict(dtype, device)
        exact = dtype != torch.float32  # 16 bits: no value that could round either way
        if exact:
            user, align = ([(4 * t).round() / 4 for t in tensors] for tensors in (user, align))
        sums = torch.tensor([-2.0, 3.0, 4.0], dtype=torch.float64, device=device)
        params = [torch.ones_like(u) for u in user]
        first, second = [u / 2 for u in user], [torch.ones_like(u) for u in user]
        step = torch.full((), 3.0, device=device)
        options = {"lr": 0.0, "betas": (0.5, 0.5)} if exact else {"lr": 0.1}
        result = module.surgery_adamw_(
            params, user, align, first, second, step, rho=0.5, sums=sums, **options
        )
        found += [result, *params, *first, *second, step]
    return found


def _conflict(dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients with a negative dot product; one is longer than a tile, others end inside one."""
    shapes = [(33, 1031), (5,), (8, 64)]
    user = [_noise(shape, seed, dtype, device) for seed, shape in enumerate(shapes)]
    return user, [-_noise(shape, 8, dtype, device) for shape in shapes]


def _kl_divergence(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        student, teacher = (_noise((5, 1031), seed, dtype, device) for seed in (0, 1))
        teacher[1, ::3] = -math.inf  # a masked vocabulary
        found.append(module.kl_divergence(student, teacher))
    return found


def _kl_divergence_(module: ModuleType, device: str) -> list[Tensor]:
    found = []
    for dtype in _DTYPES:
        student = _noise((5, 1031), 0, torch.float32, device)
        teacher, weight = _noise((5, 1031), 1, dtype, device), torch.arange(5.0, device=device)
        found += [module.kl_divergence_(student, teacher, weight), student]
    return found


def _sums(result: ops.Moments) -> list[Tensor]:
    return [*result.count, *result.sum, *result.sum_sq, *result.dots]


def _noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.5).to(device, dtype)


CASES: dict[str, Case] = {
    "moments": _moments,
    "cosine_topk": _cosine_topk,
    "kl_divergence": _kl_divergence,
    "kl_divergence_": _kl_divergence_,
    "surgery_": _surgery,
    "surgery_adamw_": _surgery_adamw,
    "surgery_merge_": _surgery_merge,
    "surgery_sums": _surgery_sums,
    "wgrad_moments": _wgrad_moments,
}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what this process may use, where the system tells
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> list[str]:
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(
            f"{facts.name} (sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB)"
        )
    return devices

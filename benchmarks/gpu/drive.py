"""Runs the steps of steps.py; if it is killed, only the running step is lost.

bash benchmarks/gpu/run.sh OUT [--only a,b] [--skip-done] [--built] [--list] [--minutes 9.5]

Every step has a folder in build/gpu_run with its log, its tables and, when it has ended, its status
in done.json. OUT gets two files: results.tar.gz, an archive of that folder which is updated every
few seconds and after each step, and report.txt, a summary. This script needs only Python 3.10. The
steps need torch 2.10 or later, setuptools 77 or later, pybind11, nvcc, cmake, ninja, pytest,
pytest-xdist and hypothesis, and the package's own dependencies.

Environment: GRADSAFE_COMMIT is the commit of a copy, else git tells it; GRADSAFE_CUDA_ARCHS is by
default the architecture of the device; DRY_RUN=1 runs every step on CPU tensors, tiny shapes.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from steps import STEPS, Step

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(os.environ.get("GRADSAFE_GPU_WORK", ROOT / "build" / "gpu_run"))
REFRESH = 3.0  # seconds between archives while a step runs
GRACE = 5  # seconds between SIGTERM and SIGKILL
SETUPTOOLS = 77
# How error lines of pytest, nvcc, ninja, Python and the sanitizer begin.
ERRORS = ("E  ", "FAILED", "ERROR", "error", "FAIL", "========= ", "RuntimeError", "Traceback")
CHECK = """
import sys, importlib.metadata as m, torch
version = m.version("setuptools")
assert int(version.split(".")[0]) >= {least}, f"setuptools {{version}}: the build needs {least}"
assert sys.version_info >= (3, 10), f"Python {{sys.version}}: 3.10 or later is needed"
for name in ("pybind11", "pytest", "xdist", "hypothesis"): __import__(name)
print(f"python {{sys.version.split()[0]}}, torch {{torch.__version__}}, setuptools {{version}}, "
      f"{{torch.cuda.device_count()}} GPUs")
assert {dry} or torch.cuda.is_available(), "torch sees no GPU: is the driver too old for its CUDA?"
"""


def say(text: str) -> None:
    """Prints without delay: a caller may see only the end of the output."""
    print(text, flush=True)


def output_of(*command: str) -> str:
    """The output of a short command, empty if it cannot run."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def check_machine(dry: bool) -> dict[str, str]:
    """Checks and prints versions; returns the architecture to build for.

    Raises:
        SystemExit: Something is missing; the text names it.
    """
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    gpus = output_of("nvidia-smi", query, "--format=csv,noheader")
    nvcc = output_of("nvcc", "--version").split("release ")[-1].split(",")[0]
    say(f"GPU: {gpus or 'none'}; nvcc {nvcc or 'none'}; {os.cpu_count()} cores")
    found = {name: shutil.which(name) for name in ("cmake", "ninja")}
    found |= {"nvidia-smi": gpus, "nvcc": nvcc}
    missing = [name for name, value in found.items() if not value]
    if missing and not dry:
        raise SystemExit(f"missing on PATH: {', '.join(missing)}")
    code = CHECK.format(least=SETUPTOOLS, dry=dry)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    say(run.stdout.strip() or run.stderr.strip().splitlines()[-1])
    if run.returncode:
        raise SystemExit(f"this Python cannot run the steps: {run.stderr.strip().splitlines()[-1]}")
    if dry:
        return {}
    capability = gpus.splitlines()[0].rsplit(",", 1)[-1].strip().replace(".", "")
    usual = f"{capability if capability.isdigit() else 90}-real"
    return {"GRADSAFE_CUDA_ARCHS": os.environ.get("GRADSAFE_CUDA_ARCHS", usual)}


def archive(out: Path) -> None:
    """Replaces OUT/results.tar.gz atomically."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "results.tmp"
    with tarfile.open(partial, "w:gz", compresslevel=1) as tar:
        for path in sorted(WORK.rglob("*")):
            if not path.is_file() or path.name.startswith("."):
                continue
            data = path.read_bytes()  # at once: a running step may replace it or add to it
            entry = tarfile.TarInfo(f"gpu_run/{path.relative_to(WORK)}")
            entry.size, entry.mtime = len(data), int(time.time())
            tar.addfile(entry, io.BytesIO(data))
    partial.replace(out / "results.tar.gz")


def table(folder: Path) -> list[str]:
    """The CSVs of a step, one short line per row."""
    lines: list[str] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            lines += [f"  {path.stem}: {short(row)}" for row in csv.DictReader(file)]
    return lines


def short(row: dict[str, str]) -> str:
    """Case and numbers of a CSV row."""
    if "ms_per_prompt" in row:
        keys = ("method", "batch", "ms_per_prompt", "extra_MB", "x_loop", "error")
        return ", ".join(f"{key} {row[key]}" for key in keys if row.get(key))
    others = [k for k in row if k.endswith("_p50_us") and row[k]]
    if "us" in row:
        return f"{row['case']}: {row['us']} us, roof {row['roof_us']} us, {row['x_roof']} of it"
    times = " ".join(f"{key.removesuffix('_p50_us')} {row[key]}" for key in others)
    flops = f" {row['TFLOP/s']} TFLOP/s" if row.get("TFLOP/s") else ""
    wrong = " WRONG" if float(row.get("checked") or 0) > 1 else ""
    return (
        f"{row.get('case')}: {row.get('p50_us')} us {row.get('GB/s')} GB/s{flops} | {times} | "
        f"host {row.get('host_us', '')} checked {row.get('checked', '')}{wrong}"
    )


def die_with_the_driver() -> None:
    """Ends a step with its driver, so that it does not write beside the run that follows."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; `timeout` passes it on


def run_step(
    step: Step, limit: float, arguments: argparse.Namespace, extra: dict[str, str], out: Path
) -> str:
    """Runs one step, updates the archive meanwhile, and returns the status."""
    folder = WORK / step.name
    places = {
        "{out}": str(folder),
        "{python}": sys.executable,
        "{resume}": "--resume" if arguments.skip_done else "",
    }
    command = list(step.dry if arguments.dry else step.command)
    for place, value in places.items():
        command = [part.replace(place, value) for part in command]
    command = [part for part in command if part]
    program = step.program or sys.executable
    environment = {**os.environ, **extra, **dict(step.environment)}
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            ["timeout", "-k", str(GRACE), str(max(1, int(limit))), program, *command],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            preexec_fn=die_with_the_driver,
        )  # fmt: skip
        try:
            while True:
                try:
                    code = process.wait(REFRESH)
                    break
                except subprocess.TimeoutExpired:
                    archive(out)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            raise
    if code in (124, 137):
        return f"TIMEOUT after {limit:.0f} s"
    return "ok" if code == 0 else f"FAILED, exit {code}"


def finish(step: Step, verdict: str, seconds: float, out: Path, report: list[str]) -> None:
    """Stores the status, updates the archive, and prints the most important lines."""
    folder = WORK / step.name
    done = {"verdict": verdict, "seconds": round(seconds, 1)}
    partial = folder / ".done"
    partial.write_text(json.dumps(done))
    partial.replace(folder / "done.json")
    lines = [f"--- {step.name}: {verdict} ({seconds:.0f} s)", *table(folder)]
    log = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    if verdict != "ok":
        errors = [line for line in log[:-10] if line.startswith(ERRORS) or ": error" in line]
        lines += [f"  {line[:200]}" for line in [*errors[:15], *log[-10:]]]
    elif len(lines) == 1:
        lines += [f"  {line[:200]}" for line in log[-3:]]
    report += lines
    (out / "report.txt").write_text("\n".join(report) + "\n")
    archive(out)
    say("\n".join(lines))


def chosen(arguments: argparse.Namespace) -> list[Step]:
    """Steps of this run in order, always with the build unless it is a dry run."""
    names = [step.name for step in STEPS]
    only = arguments.only.split(",") if arguments.only else names
    if unknown := [name for name in only if name not in names]:
        raise SystemExit(f"unknown steps {unknown}; there are: {', '.join(names)}")
    steps = [
        step
        for step in STEPS
        if (step.name in only and not (arguments.skip_done and is_done(step)))
        or (step.needed and not arguments.dry and not arguments.built)
    ]
    return [step for step in steps if step.dry or not arguments.dry]


def is_done(step: Step) -> bool:
    """Whether an earlier run completed this step without a failure."""
    path = WORK / step.name / "done.json"
    return path.exists() and json.loads(path.read_text())["verdict"] == "ok"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "build" / "gpu_results")
    parser.add_argument("--only", default="", help="names of steps, with commas between")
    parser.add_argument("--skip-done", action="store_true", help="leave out what passed before")
    parser.add_argument(
        "--built", action="store_true", help="gradsafe._C is already built; a build takes 2 minutes"
    )
    parser.add_argument("--list", action="store_true", help="names and limits of the steps")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    arguments = parser.parse_args(argv)
    if arguments.list:
        say("\n".join(f"{step.name:<12}{step.limit:>4} s" for step in STEPS))
        return 0
    arguments.dry = dry = bool(os.environ.get("DRY_RUN"))
    os.environ["PATH"] += (
        f"{os.pathsep}/usr/local/cuda/bin"  # where nvcc and the sanitizer usually are
    )
    out = arguments.out.resolve()
    steps = chosen(arguments)
    for step in steps:  # from an earlier run; a continued run keeps its rows
        if arguments.skip_done:
            (WORK / step.name / "done.json").unlink(missing_ok=True)
        else:
            shutil.rmtree(WORK / step.name, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    archive(out)
    extra = check_machine(dry)
    extra |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
        "NVCC_APPEND_FLAGS": os.environ.get("NVCC_APPEND_FLAGS", "--split-compile=0"),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GRADSAFE_CUDA": os.environ.get("GRADSAFE_CUDA", "auto" if dry else "on"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
    }
    report: list[str] = []
    for step in steps:
        left = 60 * arguments.minutes - (time.monotonic() - start)
        began = time.monotonic()
        (WORK / step.name).mkdir(parents=True, exist_ok=True)
        (WORK / step.name / "log.txt").touch()
        if step.program and shutil.which(step.program) is None:
            verdict = f"SKIPPED: {step.program} is not on PATH"
        elif left < 10:
            verdict = "SKIPPED: no time left"
        else:
            say(f"=== {step.name}")
            verdict = run_step(step, min(step.limit, left - GRACE - 1), arguments, extra, out)
        finish(step, verdict, time.monotonic() - began, out, report)
        if verdict != "ok" and step.needed:
            break
    bad = [line for line in report if line.startswith("--- ") and ": ok (" not in line]
    say("\n".join(["=== summary", *(line for line in report if line.startswith("--- "))]))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Measures on this machine, writes benchmarks/results/*.csv and the tables of docs/measured.md.

python -m benchmarks.run                   all operators on this device
python -m benchmarks.run moments           one operator
python -m benchmarks.run --dry-run         tiny shapes, nothing written; tests the scripts

Every case is compared with its float64 definition before it is timed. The CSV is written after each
case, so an interrupted run keeps its results; --resume continues it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    cases_cosine_topk,
    cases_grouped_wgrad_moments,
    cases_kl_divergence,
    cases_moments,
    cases_subspace_surgery,
    cases_surgery,
    cases_wgrad_moments,
)
from benchmarks.columns import COLUMNS
from benchmarks.environment import environment
from benchmarks.plan import Plan
from benchmarks.table import markdown, read_csv, refresh_document, row, write_csv
from benchmarks.timing import compare, graphed, host_us

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LONG_LIST = 8  # torch.compile needs minutes for lists of more tensors on a GPU
LEAST_ROUNDS = 9  # on a GPU
CASE_SECONDS = 3.0  # of timing on a GPU, where many rounds are cheap but a slow baseline is not


@dataclasses.dataclass(frozen=True)
class Operator:
    """The cases of one operator.

    Attributes:
        cpu: Cases of the CPU.
        gpu: Cases of a GPU, the most important first.
        build: Function of case and device that returns a plan.
        bytes: Bytes that a case must read or write at least once.
        tiny: Fields of a case in a dry run.
        rounds: Timed calls of each alternative; LEAST_ROUNDS or more on a GPU.
    """

    cpu: Sequence[Any]
    gpu: Sequence[Any]
    build: Callable[[Any, str], Plan]
    bytes: Callable[[Any], int]
    tiny: dict[str, Any]
    rounds: int

    def cases(self, device: str, dry_run: bool) -> list[Any]:
        """Cases of the device, or their tiny forms."""
        cases = self.gpu if device == "cuda" else self.cpu
        return [dataclasses.replace(c, **self.tiny) for c in cases] if dry_run else list(cases)


def _bytes_read(case: Any) -> int:
    return case.bytes_read


_SURGERY = (cases_surgery.CPU_CASES, cases_surgery.GPU_CASES)
_TINY_SURGERY = {"shape": (8, 24), "tensors": 2}
OPERATORS = {
    "moments": Operator(
        cases_moments.CPU_CASES,
        cases_moments.GPU_CASES,
        cases_moments.build,
        _bytes_read,
        {"shape": (8, 24), "tensors": 1},
        25,
    ),
    "surgery": Operator(
        *_SURGERY, cases_surgery.build, lambda case: case.bytes_moved, _TINY_SURGERY, 15
    ),
    "surgery_adamw": Operator(
        *_SURGERY, cases_surgery.build_adamw, lambda case: case.bytes_adamw, _TINY_SURGERY, 15
    ),
    "subspace_surgery": Operator(
        cases_subspace_surgery.CPU_CASES,
        cases_subspace_surgery.GPU_CASES,
        cases_subspace_surgery.build,
        lambda case: case.bytes_moved,
        _TINY_SURGERY,
        9,
    ),
    "wgrad_moments": Operator(
        cases_wgrad_moments.CPU_CASES,
        cases_wgrad_moments.GPU_CASES,
        cases_wgrad_moments.build,
        _bytes_read,
        {"shape": (16, 24), "tokens": 4},
        9,
    ),
    "grouped_wgrad_moments": Operator(
        cases_grouped_wgrad_moments.CPU_CASES,
        cases_grouped_wgrad_moments.GPU_CASES,
        cases_grouped_wgrad_moments.build,
        _bytes_read,
        {"shape": (16, 24), "kept": 2},
        3,
    ),
    "cosine_topk": Operator(
        cases_cosine_topk.CPU_CASES,
        cases_cosine_topk.GPU_CASES,
        cases_cosine_topk.build,
        _bytes_read,
        {"queries": 3, "rows": 200, "features": 16},
        9,
    ),
    "kl_divergence": Operator(
        cases_kl_divergence.CPU_CASES,
        cases_kl_divergence.GPU_CASES,
        cases_kl_divergence.build,
        lambda case: case.bytes_touched,
        {"tokens": 4, "vocabulary": 40},
        9,
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run measures.

    Attributes:
        device: "cpu" or "cuda".
        dry_run: Tiny shapes, three rounds.
        compiled: Whether torch.compile is among the baselines.
        seconds: No case of an operator starts after this time.
    """

    device: str
    dry_run: bool = False
    compiled: bool = True
    seconds: float = float("inf")


def measure_case(operator: Operator, case: Any, options: Options) -> dict[str, Any]:
    """One row; `checked` is the error divided by its bound, above 1 for a wrong result."""
    plan = operator.build(case, options.device)
    on_gpu = options.device == "cuda"
    checked = plan.check()
    calls = dict(plan.calls)
    if not options.compiled or (on_gpu and getattr(case, "tensors", 1) > LONG_LIST):
        calls.pop("compile", None)
    rounds = 3 if options.dry_run else max(operator.rounds, LEAST_ROUNDS if on_gpu else 0)
    limit = CASE_SECONDS if on_gpu else float("inf")
    times = compare({**calls, **plan.roofs}, options.device, rounds, seconds=limit)
    extra: dict[str, Any] = {}
    if isinstance(case, cases_grouped_wgrad_moments.Case):
        extra["segments"] = len(case.segments()[0])
    elif "loop" in times:  # over pairs, timed in part
        extra["loop_pairs_timed"] = min(case.pairs, cases_cosine_topk.LOOP_PAIRS)
        times["loop"] = times["loop"].scaled(case.pairs / extra["loop_pairs_timed"])
    found = row(case.name, operator.bytes(case), times, getattr(case, "flops", None))
    if on_gpu:
        extra["host_us"] = round(host_us(calls["gradsafe"]), 1)
        try:
            captured = compare({"graph": graphed(calls["gradsafe"])}, "cuda", rounds)["graph"]
            extra["graph_p50_us"] = round(captured.p50, 1)
        except RuntimeError as error:  # the times above are worth keeping
            extra["graph_error"] = str(error).strip().splitlines()[0][:200]
    return {**found, **extra, "checked": float(f"{checked:.2g}")}


def measured_before(path: Path) -> list[dict[str, Any]]:
    """Correct rows of an earlier run of the same commit on the same device."""
    here = environment()
    same = ("commit", "gpu", "cpu", "torch")
    return [
        r
        for r in read_csv(path)
        if all(r.get(key) == here[key] for key in same) and float(r.get("checked") or 0) <= 1
    ]


def line(found: dict[str, Any]) -> str:
    """A row for the terminal: all times, and whether the result is correct."""
    times = [key for key in found if key.endswith("_p50_us") and found[key] != ""]
    others = [f"{key.removesuffix('_p50_us')} {found[key]}" for key in times]
    rate = f"{found['TFLOP/s']} TFLOP/s" if found.get("TFLOP/s") else f"{found['GB/s']} GB/s"
    host = f", host {found['host_us']}" if found.get("host_us") else ""
    right = float(found.get("checked") or 0) <= 1
    state = f"error/bound {found.get('checked')}" if right else f"WRONG: {found['checked']} x bound"
    return f"{found['case']}: {found['p50_us']} us, {rate} ({', '.join(others)}{host}; {state})"


def measure(
    name: str, options: Options, path: Path | None, resume: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measures all cases of one operator; with a path, writes the CSV after each.

    Returns:
        The rows, and the names of the cases that failed or were wrong.
    """
    operator = OPERATORS[name]
    rows = measured_before(path) if path and resume else []
    failed, start = [], time.perf_counter()
    for case in operator.cases(options.device, options.dry_run):
        if any(found["case"] == case.name for found in rows):
            continue
        if time.perf_counter() - start > options.seconds:
            print(f"{name}, {case.name}: NOT MEASURED, time limit reached", flush=True)
            failed.append(case.name)
            continue
        try:
            rows.append(measure_case(operator, case, options))
        except Exception:  # the other cases may still be measured
            print(f"{name}, {case.name}: FAILED\n{traceback.format_exc(limit=-4)}", flush=True)
            failed.append(case.name)
        else:
            if path:
                write_csv(path, rows)
            print(f"{name}, {line(rows[-1])}", flush=True)
            if "graph_error" in rows[-1]:
                print(f"{name}, {case.name}: NO GRAPH, {rows[-1]['graph_error']}", flush=True)
            if rows[-1]["checked"] > 1 or "graph_error" in rows[-1]:
                failed.append(case.name)
        torch._dynamo.reset()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return rows, failed


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("operators", nargs="*", choices=[*OPERATORS, []], default=[])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--dry-run", action="store_true", help="written only if --out is given")
    parser.add_argument("--out", type=Path, help="folder of the CSVs")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each operator")
    parser.add_argument("--resume", action="store_true", help="keep rows of this commit and device")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(device, arguments.dry_run, not arguments.no_compile, arguments.seconds)
    out = arguments.out or (None if arguments.dry_run else RESULTS)
    broken = []
    for name in arguments.operators or OPERATORS:
        path = out / f"{name}_{device}.csv" if out else None
        rows, failed = measure(name, options, path, arguments.resume)
        broken += [f"{name}, {case}" for case in failed]
        if device == "cpu":  # GPU rows were printed one by one; the output of a GPU run is limited
            print(markdown(rows, COLUMNS[name]))
        if out == RESULTS and not arguments.dry_run:
            refresh_document(f"{name} {device}", markdown(rows, COLUMNS[name]))
    for case in broken:
        print(f"FAILED OR WRONG: {case}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())

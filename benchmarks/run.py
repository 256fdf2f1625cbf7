"""Measures on this machine, writes benchmarks/results/*.csv and the tables of docs/measured.md.

python -m benchmarks.run                   everything that exists for this device
python -m benchmarks.run moments           one operator
python -m benchmarks.run --dry-run         tiny shapes, nothing written: do the scripts run?
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import (
    cases_cosine_topk,
    cases_grouped_wgrad_moments,
    cases_kl_divergence,
    cases_moments,
    cases_surgery,
    cases_wgrad_moments,
)
from benchmarks.table import markdown, refresh_document, row, write_csv
from benchmarks.timing import compare, graphed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = {
    "moments": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GB/s", "GB/s"),
        ("x_read", "time / read"),
        ("x_eager", "vs eager"),
        ("x_shared", "vs eager, products shared"),
        ("x_foreach", "vs foreach"),
        ("x_compile", "vs compile"),
    ],
    "surgery": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GB/s", "GB/s"),
        ("x_copy", "time / copy"),
        ("x_cat", "vs cat"),
        ("x_foreach", "vs dot + foreach"),
    ],
    "surgery_adamw": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GB/s", "GB/s"),
        ("x_copy", "time / copy"),
        ("x_fused", "vs fused AdamW alone"),
        ("x_two", "vs surgery_, then fused AdamW"),
        ("x_foreach", "vs dot + foreach, then fused AdamW"),
    ],
    "wgrad_moments": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GFLOP/s", "GFLOP/s"),
        ("x_gemm", "time / bare GEMM"),
        ("x_eager", "vs GEMM + eager"),
        ("x_compile", "vs compile"),
    ],
    "grouped_wgrad_moments": [
        ("case", "case"),
        ("segments", "segments"),
        ("p50_us", "µs"),
        ("GFLOP/s", "GFLOP/s"),
        ("x_gemm", "time / bare grouped GEMM"),
        ("x_loop", "vs loop over experts"),
    ],
    "cosine_topk": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GFLOP/s", "GFLOP/s"),
        ("x_gemm", "time / bare GEMM"),
        ("x_read", "time / read"),
        ("x_eager", "vs normalise + matmul + topk"),
        ("x_compile", "vs compile"),
        ("x_loop", "vs loop over pairs"),
    ],
    "kl_divergence": [
        ("case", "case"),
        ("p50_us", "µs"),
        ("GB/s", "GB/s"),
        ("x_read", "time / read of both"),
        ("x_eager", "vs eager"),
        ("x_closed_form", "vs closed form"),
        ("x_compile", "vs compile"),
    ],
}


def measure_moments(device: str, dry_run: bool) -> list[dict[str, Any]]:
    """All cases of `moments`; on CUDA also the captured call."""
    rows = []
    for case in tqdm(
        cases_moments.GPU_CASES if device == "cuda" else cases_moments.CPU_CASES, desc="moments"
    ):
        if dry_run:
            case = dataclasses.replace(case, shape=(8, 24), tensors=min(case.tensors, 2))
        calls, roofs = cases_moments.build(case, device)
        times = compare({**calls, **roofs}, device, rounds=3 if dry_run else 25)
        rows.append(row(case.name, case.bytes_read, times))
        if device == "cuda":
            captured = compare({"graph": graphed(calls["gradsafe"])}, device)["graph"]
            rows[-1]["graph_p50_us"] = round(captured.p50, 1)
        torch._dynamo.reset()
    return rows


def measure_wgrad_moments(device: str, dry_run: bool) -> list[dict[str, Any]]:
    """All cases of `wgrad_moments`, with the rate of multiply-adds."""
    rows = []
    for case in tqdm(
        cases_wgrad_moments.GPU_CASES if device == "cuda" else cases_wgrad_moments.CPU_CASES,
        desc="wgrad_moments",
    ):
        if dry_run:
            case = dataclasses.replace(case, shape=(16, 24), tokens=min(case.tokens, 4))
        calls, roofs = cases_wgrad_moments.build(case, device)
        times = compare({**calls, **roofs}, device, rounds=3 if dry_run else 9)
        rows.append(row(case.name, case.bytes_read, times))
        rows[-1]["GFLOP/s"] = round(case.flops / times["gradsafe"].p50 / 1e3, 1)
        torch._dynamo.reset()
    return rows


def measure_grouped_wgrad_moments(device: str, dry_run: bool) -> list[dict[str, Any]]:
    """All cases of `grouped_wgrad_moments`, with the rate of multiply-adds."""
    rows = []
    cases = cases_grouped_wgrad_moments
    for case in tqdm(
        cases.GPU_CASES if device == "cuda" else cases.CPU_CASES, desc="grouped_wgrad_moments"
    ):
        if dry_run:
            case = dataclasses.replace(case, shape=(16, 24), kept=2)
        calls, roofs = cases.build(case, device)
        times = compare({**calls, **roofs}, device, rounds=3 if device == "cpu" else 9, warm_up=1)
        rows.append(row(case.name, case.bytes_read, times))
        rows[-1]["segments"] = len(case.segments()[0])
        rows[-1]["GFLOP/s"] = round(case.flops / times["gradsafe"].p50 / 1e3, 1)
    return rows


def measure_cosine_topk(device: str, dry_run: bool) -> list[dict[str, Any]]:
    """All cases of `cosine_topk`; the loop over pairs is timed in part and scaled."""
    rows = []
    for case in tqdm(
        cases_cosine_topk.GPU_CASES if device == "cuda" else cases_cosine_topk.CPU_CASES,
        desc="cosine_topk",
    ):
        if dry_run:
            case = dataclasses.replace(case, queries=3, rows=200, features=16)
        calls, roofs = cases_cosine_topk.build(case, device)
        times = compare({**calls, **roofs}, device, rounds=3 if dry_run else 9)
        if "loop" in times:
            timed = min(case.pairs, cases_cosine_topk.LOOP_PAIRS)
            times["loop"] = times["loop"].scaled(case.pairs / timed)
        rows.append(row(case.name, case.bytes_read, times))
        rows[-1]["GFLOP/s"] = round(case.flops / times["gradsafe"].p50 / 1e3, 1)
        if "loop" in times:
            rows[-1]["loop_pairs_timed"] = timed
        torch._dynamo.reset()
    return rows


def measure_kl_divergence(device: str, dry_run: bool) -> list[dict[str, Any]]:
    """All cases of `kl_divergence_`."""
    rows = []
    for case in tqdm(
        cases_kl_divergence.GPU_CASES if device == "cuda" else cases_kl_divergence.CPU_CASES,
        desc="kl_divergence",
    ):
        if dry_run:
            case = dataclasses.replace(case, tokens=4, vocabulary=40)
        calls, roofs = cases_kl_divergence.build(case, device)
        times = compare({**calls, **roofs}, device, rounds=3 if dry_run else 9)
        rows.append(row(case.name, case.bytes_touched, times))
        torch._dynamo.reset()
    return rows


def measure_surgery(device: str, dry_run: bool, adamw: bool = False) -> list[dict[str, Any]]:
    """All cases of `surgery_` or `surgery_adamw_`; on CUDA also the captured call."""
    build = cases_surgery.build_adamw if adamw else cases_surgery.build
    rows = []
    for case in tqdm(
        cases_surgery.GPU_CASES if device == "cuda" else cases_surgery.CPU_CASES,
        desc="surgery_adamw" if adamw else "surgery",
    ):
        if dry_run:
            case = dataclasses.replace(case, shape=(8, 24), tensors=2)
        calls, roofs = build(case, device)
        times = compare({**calls, **roofs}, device, rounds=3 if dry_run else 15)
        rows.append(row(case.name, case.bytes_adamw if adamw else case.bytes_moved, times))
        if device == "cuda":
            captured = compare({"graph": graphed(calls["gradsafe"])}, device)["graph"]
            rows[-1]["graph_p50_us"] = round(captured.p50, 1)
    return rows


def measure_surgery_adamw(device: str, dry_run: bool) -> list[dict[str, Any]]:
    """All cases of `surgery_adamw_`."""
    return measure_surgery(device, dry_run, adamw=True)


OPERATORS: dict[str, Callable[[str, bool], list[dict[str, Any]]]] = {
    "moments": measure_moments,
    "surgery": measure_surgery,
    "surgery_adamw": measure_surgery_adamw,
    "wgrad_moments": measure_wgrad_moments,
    "grouped_wgrad_moments": measure_grouped_wgrad_moments,
    "cosine_topk": measure_cosine_topk,
    "kl_divergence": measure_kl_divergence,
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("operators", nargs="*", choices=[*OPERATORS, []], default=[])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSVs")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name in arguments.operators or OPERATORS:
        rows = OPERATORS[name](device, arguments.dry_run)
        print(markdown(rows, COLUMNS[name]))
        if arguments.dry_run:
            continue
        path = arguments.out / f"{name}_{device}.csv"
        write_csv(path, rows)
        if arguments.out == RESULTS:
            refresh_document(f"{name} {device}", markdown(rows, COLUMNS[name]))
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

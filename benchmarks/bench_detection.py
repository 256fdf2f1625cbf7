"""Detection end to end: time per prompt and peak memory of each method.

On the CPU each method runs in its own process, to measure the peak memory of that process. On a GPU
one process builds the model once and resets torch's peak before each method; there the batched
methods with the largest batch come first.

python -m benchmarks.bench_detection                           the default sweep, CSV
python -m benchmarks.bench_detection --size 100M --tokens 64   one model and length
python -m benchmarks.bench_detection --size 7B --device cuda --dtype bfloat16

The loops score one prompt at a time. `x_loop` is the speed-up over the published loop in the same
dtype, `x_loop_fp32` over the one in float32, if it was measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.detection_methods import METHODS
from benchmarks.detection_models import SIZES, make_model, make_prompts, make_tokenizer
from benchmarks.table import markdown, refresh_document, write_csv

RESULTS = Path(__file__).resolve().parent / "results"
LOOP_PROMPTS = 3
ROUNDS = 3
COLUMNS = [
    ("size", "model"),
    ("tokens", "tokens"),
    ("dtype", "dtype"),
    ("method", "method"),
    ("batch", "batch"),
    ("ms_per_prompt", "ms / prompt"),
    ("x_loop", "vs loop"),
    ("x_loop_fp32", "vs fp32 loop"),
    ("extra_MB", "peak MB above model and references"),
    ("extra_share", "of the weights"),
]


@dataclass(frozen=True)
class Point:
    """A model, a prompt length, and the batch sizes of the batched methods."""

    size: str
    tokens: int
    batches: tuple[int, ...]
    dtype: str = "float32"


SWEEP = [
    Point("100M", 64, (1, 4, 16, 32)),
    Point("100M", 64, (1, 16), "bfloat16"),
    Point("60M", 64, (1, 16)),
    Point("100M", 16, (16,)),
    Point("100M", 256, (16,)),
    Point("300M", 64, (16,)),
    Point("1B", 64, (8,)),
]


def peak_bytes(device: str) -> int:
    """Peak memory so far: of the process, or of torch on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    method: str, batch: int, point: Point, device: str, model: nn.Module | None = None
) -> dict[str, Any]:
    """Measures one method in this process, on a new model or on a given one."""
    model = model or make_model(point.size, getattr(torch, point.dtype), device)
    tokenizer = make_tokenizer()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start_memory = peak_bytes(device)
    references = make_prompts(4, 32)
    prepare = METHODS[method].prepare
    score, reference_bytes = prepare(model, tokenizer, references[:2], references[2:], batch)
    prompts = make_prompts(max(batch, LOOP_PROMPTS), point.tokens)
    found = {len(ids) for ids in tokenizer(prompts).input_ids}
    if found != {point.tokens}:
        raise RuntimeError(f"expected prompts of {point.tokens} tokens, got {sorted(found)}")
    score(prompts[: max(batch, 1)])  # warm-up
    times = []
    for _ in range(ROUNDS):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        score(prompts)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / len(prompts))
    extra = peak_bytes(device) - start_memory - reference_bytes
    return {
        "ms_per_prompt": round(sorted(times)[ROUNDS // 2] * 1e3, 2),
        "extra_MB": round(extra / 1e6),
        "extra_share": round(extra / weights, 3),
        "references_MB": round(reference_bytes / 1e6),
        "weights_MB": round(weights / 1e6),
    }


def in_fresh_process(method: str, batch: int, point: Point, device: str) -> dict[str, Any]:
    """`measure` in a new process, whose peak memory comes from this method alone."""
    command = [
        sys.executable, "-m", "benchmarks.bench_detection", "--one", method,
        "--batch", str(batch), "--size", point.size, "--tokens", str(point.tokens),
        "--dtype", point.dtype, "--device", device,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"ms_per_prompt": float("nan"), "error": run.stderr.strip().splitlines()[-1][:200]}
    return json.loads(run.stdout.splitlines()[-1])


def in_this_process() -> Callable[[str, int, Point, str], dict[str, Any]]:
    """`measure` in this process; keeps the model of the last point."""
    kept: dict[Point, nn.Module] = {}

    def run(method: str, batch: int, point: Point, device: str) -> dict[str, Any]:
        if point not in kept:
            kept.clear()
            kept[point] = make_model(point.size, getattr(torch, point.dtype), device)
        model = kept[point].requires_grad_(True)  # a loop may have frozen some weights
        try:
            return measure(method, batch, point, device, model)
        except Exception as error:  # the other methods may still be measured
            return {
                "ms_per_prompt": float("nan"),
                "error": f"{type(error).__name__}: {error}"[:200],
            }
        finally:
            model.zero_grad(set_to_none=True)

    return run


def compare_with_loops(rows: list[dict[str, Any]]) -> None:
    """Adds the speed-up over the published loop, which may be measured last."""
    loops = {
        (r["size"], r["tokens"], r["dtype"]): r["ms_per_prompt"]
        for r in rows
        if r["method"] == "gradsafe loop"
    }
    for r in rows:
        for column, dtype in (("x_loop", r["dtype"]), ("x_loop_fp32", "float32")):
            loop = loops.get((r["size"], r["tokens"], dtype))
            if loop is not None:
                r[column] = round(loop / r["ms_per_prompt"], 2)


def sweep(points: list[Point], device: str, path: Path) -> list[dict[str, Any]]:
    """All methods at all points; the CSV is written after each measurement."""
    plan = [
        (point, name, batch)
        for point in points
        for name, method in METHODS.items()
        for batch in (point.batches if method.batched else (1,))
    ]
    run: Callable[[str, int, Point, str], dict[str, Any]] = in_fresh_process
    if device == "cuda":
        run = in_this_process()
        plan.sort(key=lambda one: (not METHODS[one[1]].batched, -one[2]))
    rows: list[dict[str, Any]] = []
    for point, name, batch in tqdm(plan, unit="method"):
        result = run(name, batch, point, device)
        row = {"size": point.size, "tokens": point.tokens, "dtype": point.dtype}
        rows.append({**row, "method": name, "batch": batch, **result})
        compare_with_loops(rows)
        write_csv(path, rows)
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--one", choices=[*METHODS], help="measure in this process, print JSON")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", choices=[*SIZES])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    a = parser.parse_args()
    batches = (a.batch,) if a.one else tuple(sorted({1, a.batch}))
    point = Point(a.size or "tiny", a.tokens, batches, a.dtype)
    if a.one:
        print(json.dumps(measure(a.one, a.batch, point, a.device)))
        return 0
    name = f"detection_{a.device}" + (f"_{a.size}_{a.dtype}" if a.size else "")
    rows = sweep([point] if a.size else SWEEP, a.device, a.out / f"{name}.csv")
    print(markdown(rows, COLUMNS))
    if not a.size and a.out == RESULTS:
        refresh_document(f"detection {a.device}", markdown(rows, COLUMNS))
    return 1 if any(r.get("error") for r in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())

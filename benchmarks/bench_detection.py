"""Detection end to end: prompts per second and peak memory of each method, in fresh processes.

python -m benchmarks.bench_detection                           the default sweep, CSV
python -m benchmarks.bench_detection --size 100M --tokens 64   one point
python -m benchmarks.bench_detection --size 7B --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.detection_methods import METHODS, ours
from benchmarks.detection_models import SIZES, make_model, make_prompts, make_tokenizer
from benchmarks.table import markdown, write_csv

RESULTS = Path(__file__).resolve().parent / "results"
SWEEP = [("60M", 16), ("60M", 64), ("60M", 256), ("100M", 64), ("300M", 64)]
COLUMNS = [
    ("size", "model"),
    ("tokens", "tokens"),
    ("dtype", "dtype"),
    ("method", "method"),
    ("ms_per_prompt", "ms / prompt"),
    ("x_loop", "vs loop"),
    ("extra_MB", "peak MB above model"),
]


def peak_bytes(device: str) -> int:
    """Peak memory so far: of the process, or of torch on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(method: str, size: str, tokens: int, dtype: str, device: str, count: int) -> dict:
    """One method in this process."""
    model = make_model(size, getattr(torch, dtype), device)
    tokenizer = make_tokenizer()
    prepare = METHODS[method]
    if "half layers" in method:
        prepare = ours(16, layers=SIZES[size][2] // 2)
    start_memory = peak_bytes(device)
    references = make_prompts(4, 32)
    score = prepare(model, tokenizer, references[:2], references[2:])
    prompts = make_prompts(count, tokens)
    score(prompts[: min(count, 16)])  # warm-up
    times = []
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        score(prompts)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / count)
    return {
        "ms_per_prompt": round(sorted(times)[1] * 1e3, 2),
        "extra_MB": round((peak_bytes(device) - start_memory) / 1e6),
        "weights_MB": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6),
    }


def in_fresh_process(method: str, size: str, tokens: int, dtype: str, device: str) -> dict:
    """`measure` where nothing ran before: peak memory means something only there."""
    command = [
        sys.executable, "-m", "benchmarks.bench_detection", "--one", method, "--size", size,
        "--tokens", str(tokens), "--dtype", dtype, "--device", device,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"ms_per_prompt": float("nan"), "error": run.stderr.strip().splitlines()[-1][:200]}
    return json.loads(run.stdout.splitlines()[-1])


def sweep(points: list[tuple[str, int]], dtype: str, device: str) -> list[dict[str, Any]]:
    """All methods at all points."""
    rows = []
    for size, tokens in points:
        loop = None
        for method in METHODS:
            result = in_fresh_process(method, size, tokens, dtype, device)
            loop = loop or result["ms_per_prompt"]
            rows.append(
                {"size": size, "tokens": tokens, "dtype": dtype, "method": method, **result}
            )
            rows[-1]["x_loop"] = round(loop / result["ms_per_prompt"], 2)
            print(rows[-1], flush=True)
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--one", choices=[*METHODS], help="measure in this process, print JSON")
    parser.add_argument("--size", choices=[*SIZES])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--count", type=int, default=16)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a.one, a.size, a.tokens, a.dtype, a.device, a.count)))
        return 0
    points = [(a.size, a.tokens)] if a.size else SWEEP
    rows = sweep(points, a.dtype, a.device)
    print(markdown(rows, COLUMNS))
    name = f"detection_{a.device}" + (f"_{a.size}_{a.dtype}" if a.size else "")
    write_csv(a.out / f"{name}.csv", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

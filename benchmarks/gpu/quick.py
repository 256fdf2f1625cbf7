"""Times every operator at its main sizes on a GPU, in half a minute.

python benchmarks/gpu/quick.py [TABLE.csv]

Median time in microseconds by CUDA events, each call after a flush of the L2 cache. The device is
kept busy for 0.1 ms before each call, so CPU work of a call is included only beyond that time.
`roof` is the bare product (bmm, matmul), PyTorch's fused AdamW, or a copy of the same bytes.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks.environment import environment
from gradsafe.ops import (
    cosine_topk,
    kl_divergence_,
    moments,
    surgery_,
    surgery_adamw_,
    wgrad_moments,
)

BF16, F32, F8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
MLP, ATTENTION, LORA = (4096, 11008), (4096, 4096), (8, 2048)
FLUSH_BYTES, BUSY_CYCLES, ROUNDS = 256 << 20, 200_000, 9
ROWS: list[dict[str, object]] = []


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", F32: "fp32", F8: "float8"}[dtype]


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def median_us(call: Callable[[], object]) -> float:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(ROUNDS + 2):
        flush.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3)
    return sorted(samples[2:])[ROUNDS // 2]


def report(case: str, call: Callable[[], object], roof: Callable[[], object] | int) -> None:
    """One row; a number as `roof` is the number of bytes that a copy would move."""
    own = median_us(call)
    bound = roof / copy_rate() * 1e6 if isinstance(roof, int) else median_us(roof)
    ROWS.append({"case": case, "us": round(own, 1), "roof_us": round(bound, 1),
                 "x_roof": round(own / bound, 2)})  # fmt: skip
    print(f"{case:58} {own:9.1f} us  roof {bound:9.1f}  {own / bound:5.2f}", flush=True)


def copy_rate(known: list[float] = []) -> float:  # noqa: B006 (measured once)
    """Bytes per second of a copy, reads plus writes."""
    if not known:
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        known.append(2 * source.numel() / median_us(lambda: target.copy_(source)) * 1e6)
    return known[0]


def measure_wgrad(samples: int, tokens: int, shape: tuple[int, int], axis, ref_dtype=BF16) -> None:
    x, dy = randn(samples, tokens, shape[1]), randn(samples, tokens, shape[0])
    refs = [randn(*shape).to(ref_dtype) for _ in range(2)]
    store = torch.empty(samples, *shape, device="cuda", dtype=BF16)
    report(
        f"wgrad_moments {samples} x {tokens} {list(shape)} {axis} refs {short(ref_dtype)}",
        lambda: wgrad_moments(x, dy, refs, axis),
        lambda: torch.bmm(dy.transpose(1, 2), x, out=store),
    )


def measure_moments(count: int, shape: tuple[int, int], axis, dtype: torch.dtype) -> None:
    grads = [randn(*shape, dtype=dtype) for _ in range(count)]
    refs = [[randn(*shape, dtype=dtype) for _ in range(2)] for _ in grads]
    read = 3 * count * grads[0].numel() * dtype.itemsize
    name = f"moments {count} x {list(shape)} {axis} {short(dtype)}"
    report(name, lambda: moments(grads, refs, axis), read)


def measure_kl(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    student, teacher = (3 * randn(tokens, vocabulary, dtype=dtype) for _ in range(2))
    weight = torch.ones(tokens, device="cuda")
    moved = 3 * student.numel() * dtype.itemsize
    report(
        f"kl_divergence_ {tokens} x {vocabulary} {short(dtype)}",
        lambda: kl_divergence_(student, teacher, weight),
        moved,
    )


def measure_surgery(count: int, shape: tuple[int, int]) -> None:
    user, align, params, first, second = ([randn(*shape) for _ in range(count)] for _ in range(5))
    second = [v.abs() for v in second]
    moved = 5 * count * user[0].numel() * 2
    name = f"{count} x {list(shape)} bf16"
    report(f"surgery_ {name}", lambda: surgery_(user, align), moved)
    step = torch.zeros((), device="cuda")
    steps = [torch.zeros((), device="cuda") for _ in params]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    report(
        f"surgery_adamw_ {name}",
        lambda: surgery_adamw_(params, user, align, first, second, step),
        lambda: torch._fused_adamw_(
            params, user, first, second, [], steps, amsgrad=False, maximize=False, **options
        ),
    )


def measure_cosine(queries: int, rows: int, features: int, dtype: torch.dtype) -> None:
    q, r = randn(queries, features, dtype=dtype), randn(rows, features, dtype=dtype)
    name = f"cosine_topk {queries} x {rows} x {features} {short(dtype)}"
    report(name, lambda: cosine_topk(q, r, 10), lambda: q @ r.t())


def main() -> None:
    """Prints all rows, and writes a table if a path is given."""
    for axis in ("tensor", "row", "both"):
        measure_wgrad(8, 100, MLP, axis)
    measure_wgrad(16, 64, ATTENTION, "tensor")
    measure_wgrad(1, 100, MLP, "tensor")
    measure_wgrad(8, 100, MLP, "tensor", F8)
    for axis in ("tensor", "row", "both"):
        measure_moments(8, MLP, axis, BF16)
        measure_moments(4, MLP, axis, F32)
    measure_moments(64, LORA, "tensor", BF16)
    for vocabulary, dtype in ((32_000, BF16), (128_256, BF16), (32_000, F32)):
        measure_kl(1024, vocabulary, dtype)
    measure_surgery(32, ATTENTION)
    for dtype in (F32, BF16):
        measure_cosine(500, 5000, 8192, dtype)
    for queries in (500, 1):
        measure_cosine(queries, 500_000, 2048, BF16)
    if len(sys.argv) > 1:
        with Path(sys.argv[1]).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*ROWS[0], *environment()])
            writer.writeheader()
            writer.writerows({**row, **environment()} for row in ROWS)


if __name__ == "__main__":
    main()

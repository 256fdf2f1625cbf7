"""Output head and KL divergence, forward and backward: chunked versus all logits at once.

python -m benchmarks.bench_alignment                  CSV and table, alternatives in turns
python -m benchmarks.bench_alignment --dry-run        tiny shapes, nothing written

The time covers the student's and the teacher's logits, the divergence and the gradient of the
student's hidden states (and of the head if it is trained). Memory is the growth of the peak
resident set size during one call in a new process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.environment import environment
from benchmarks.table import markdown, row, write_csv
from benchmarks.timing import compare
from gradsafe.finetuning.chunked_kl import CHUNK_TOKENS, chunked_kl
from gradsafe.finetuning.output_head import OutputHead

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Case:
    """Tokens of one alignment batch, and the output head."""

    name: str
    tokens: int
    vocabulary: int
    width: int
    dtype: str
    trained_head: bool = False


CASES = [
    Case("1024 x 32k, d 768, fp32", 1024, 32_000, 768, "float32"),
    Case("1024 x 32k, d 768, fp32, head trained", 1024, 32_000, 768, "float32", True),
    Case("1024 x 32k, d 768, bf16", 1024, 32_000, 768, "bfloat16"),
    Case("4096 x 32k, d 768, fp32", 4096, 32_000, 768, "float32"),
]


def build(case: Case) -> dict[str, Callable[[], object]]:
    """Alternatives of one case, and the bare matrix products as the lower bound."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    head = nn.Linear(case.width, case.vocabulary, bias=False, dtype=dtype)
    head.weight.data = noise(case.vocabulary, case.width) / case.width**0.5 * 3
    head.requires_grad_(case.trained_head)
    hidden = noise(case.tokens, case.width)
    reference = hidden + 0.1 * noise(case.tokens, case.width)
    wrapped = OutputHead(head, None, "benchmark")

    def teacher(begin: int, end: int) -> Tensor:
        with torch.no_grad():
            return head(reference[begin:end])

    def finish(leaf: Tensor, loss: Tensor) -> None:
        (loss / case.tokens).backward()
        head.weight.grad = leaf.grad = None

    def ours() -> None:
        leaf = hidden.detach().requires_grad_()
        finish(leaf, chunked_kl(leaf, wrapped, teacher))

    def eager() -> None:
        leaf = hidden.detach().requires_grad_()
        target = teacher(0, case.tokens).float().softmax(1)
        student = head(leaf).float().log_softmax(1)
        finish(leaf, functional.kl_div(student, target, reduction="sum"))

    def products() -> None:
        with torch.no_grad():
            teacher(0, case.tokens)
            logits = head(hidden)
            logits @ head.weight
            if case.trained_head:
                logits.t() @ hidden

    return {"gradsafe": ours, "eager": eager, "gemm": products}


def peak_megabytes(case: Case, alternative: str) -> int:
    """Growth of the peak resident set size during one call, measured in a new process."""
    options = [f"--{k.replace('_', '-')}={v}" for k, v in asdict(case).items() if k != "name"]
    command = [sys.executable, "-m", "benchmarks.bench_alignment", "--memory", alternative]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def report_memory(case: Case, alternative: str) -> None:
    """Runs in the process of `peak_megabytes`; a call on few tokens first loads libraries."""
    build(replace(case, tokens=2, vocabulary=64))[alternative]()
    call = build(case)[alternative]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak (Linux)
    before = _peak_kilobytes()
    call()
    print((_peak_kilobytes() - before) // 1024)


def _peak_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(dry_run: bool) -> list[dict[str, Any]]:
    """All cases."""
    rows = []
    for case in CASES:
        if dry_run:
            case = replace(case, tokens=8, vocabulary=40, width=16)
        times = compare(build(case), "cpu", rounds=2 if dry_run else 5, warm_up=1)
        itemsize = getattr(torch, case.dtype).itemsize
        touched = itemsize * case.width * (2 * case.tokens + case.vocabulary)
        result = row(case.name, touched, times)
        del result["GB/s"]
        result["chunk_tokens"] = CHUNK_TOKENS
        for name in ("gradsafe", "eager"):
            result[f"{name}_peak_MB"] = peak_megabytes(case, name)
        rows.append(result)
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    for name in ("--tokens", "--vocabulary", "--width"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--trained-head", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.memory:
        trained = a.trained_head == "True"
        report_memory(Case("", a.tokens, a.vocabulary, a.width, a.dtype, trained), a.memory)
        return 0
    rows = measure(a.dry_run)
    columns = [("case", "case"), ("p50_us", "µs"), ("x_gemm", "time / bare GEMMs")]
    columns += [
        ("x_eager", "vs eager"),
        ("gradsafe_peak_MB", "peak MB"),
        ("eager_peak_MB", "eager"),
    ]
    print(markdown(rows, columns))
    if not a.dry_run:
        write_csv(a.out / "alignment_cpu.csv", rows)
        facts = environment()
        print(
            f"written: {a.out / 'alignment_cpu.csv'} ({facts['cpu']}, {facts['threads']} threads)"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

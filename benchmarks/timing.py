"""Timing on a machine with other load: alternatives take turns, and medians are compared.

All alternatives of a case are called round-robin, so that a slow phase of the machine affects each
of them. On CUDA each call is timed with events after a flush of the L2 cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

L2_FLUSH_BYTES = 512 << 20


@dataclass(frozen=True)
class Timing:
    """Quantiles of one alternative, in microseconds."""

    p20: float
    p50: float
    p80: float

    def scaled(self, factor: float) -> Timing:
        """The timing of the whole work, from a call that did only a part of it."""
        return Timing(self.p20 * factor, self.p50 * factor, self.p80 * factor)


def _quantiles(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(*(ordered[round(q * last)] for q in (0.2, 0.5, 0.8)))


def _cpu_round(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


class _CudaRound:
    def __init__(self) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.start = torch.cuda.Event(enable_timing=True)
        self.stop = torch.cuda.Event(enable_timing=True)

    def __call__(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        self.start.record()
        call()
        self.stop.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.stop) * 1e3


def compare(
    alternatives: Mapping[str, Callable[[], object]],
    device: str,
    rounds: int = 25,
    warm_up: int = 3,
    seconds: float = float("inf"),
) -> dict[str, Timing]:
    """Times alternatives in turns.

    Args:
        alternatives: Name to a call without arguments.
        device: "cpu" or "cuda".
        rounds: Timed calls of each alternative.
        warm_up: Calls of each alternative before timing.
        seconds: No round starts after this time, but at least three are timed.

    Returns:
        Quantiles of each alternative.
    """
    once = _CudaRound() if device == "cuda" else _cpu_round
    for call in alternatives.values():
        for _ in range(warm_up):
            call()
    if device == "cuda":
        torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, call in alternatives.items():
            samples[name].append(once(call))
    return {name: _quantiles(values) for name, values in samples.items()}


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a replayed CUDA graph, without the launch cost on the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_us(call: Callable[[], object], calls: int = 20) -> float:
    """Median time until a CUDA call returns to Python, in microseconds: its cost on the CPU.

    `compare` does not measure it because the CPU prepares the call while the cache is flushed.
    Here the GPU is idle before each call, so the call never waits for a full queue.
    """
    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        samples.append(_cpu_round(call))
    torch.cuda.synchronize()
    return sorted(samples)[calls // 2]

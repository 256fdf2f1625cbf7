"""Captures the process's first call of each operator in a CUDA graph, replays it, compares.

Prints the operators in turn; exits with an error at the first one that fails or differs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradsafe.ops import (
    cosine_topk,
    grouped_wgrad_moments,
    kl_divergence_,
    moments,
    subspace_surgery_,
    surgery_,
    surgery_adamw_,
    wgrad_moments,
)


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def captured(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Results of a call whose first run is the replay of a graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    torch.cuda.synchronize()
    return [r.clone() for r in results]


def compare(name: str, call: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> None:
    """The captured call on copies of the inputs, then the same as usual; they may be changed."""
    copies = [t.clone() for t in inputs]
    replayed = [*captured(lambda: call(copies)), *copies]
    again = [t.clone() for t in inputs]
    usual = [*call(again), *again]
    for a, b in zip(replayed, usual, strict=True):
        if not torch.equal(a, b):
            raise SystemExit(f"{name}: the replayed result differs")
    print(name, flush=True)


def main() -> None:
    torch.manual_seed(0)
    torch.cuda.current_stream().synchronize()
    matrices = [noise(128, 256) for _ in range(3)]
    compare("moments", lambda t: [*(m := moments(t[:1], [t[1:]])).sum, *m.dots], matrices)

    def wgrad(t: list[Tensor]) -> list[Tensor]:
        result = wgrad_moments(t[0], t[1], t[2:])
        return [result.sum, result.sum_sq, result.dots]

    factors = [noise(2, 32, 256), noise(2, 32, 128)]
    compare("wgrad_moments", wgrad, [*factors, *(noise(128, 256) for _ in range(2))])

    def grouped(t: list[Tensor]) -> list[Tensor]:
        result = grouped_wgrad_moments(t[0], t[1], t[2:], [20, 5], [1, 0])
        return [result.sum, result.sum_sq, result.dots]

    experts = [noise(25, 256), noise(25, 128), noise(2, 128, 256)]
    compare("grouped_wgrad_moments", grouped, experts)
    vectors = [noise(20, 128), noise(5000, 128)]
    compare("cosine_topk", lambda t: [*cosine_topk(t[0], t[1], 5)], vectors)
    logits = [noise(9, 4096), noise(9, 4096), noise(9, dtype=torch.float32)]
    compare("kl_divergence_", lambda t: [kl_divergence_(t[0], t[1], t[2])], logits)
    gradients = [noise(64, 100), noise(64, 100)]
    compare("surgery_", lambda t: [surgery_(t[:1], t[1:])], gradients)

    def adamw(t: list[Tensor]) -> list[Tensor]:
        return [surgery_adamw_(t[0:1], t[1:2], t[2:3], t[3:4], t[4:5], t[5])]

    second, step = torch.rand(64, 100, device="cuda").bfloat16(), torch.ones((), device="cuda")
    state = [noise(64, 100), *gradients, noise(64, 100), second, step]
    compare("surgery_adamw_", adamw, state)

    vectors = [torch.linalg.qr(torch.randn(6400, 3, device="cuda"))[0].T.reshape(3, 64, 100)]
    opposed = torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64, device="cuda")
    subspace = [noise(64, 100), vectors[0].contiguous().bfloat16(), opposed]
    compare("subspace_surgery_", lambda t: [subspace_surgery_(t[:1], t[1:2], t[2])], subspace)


if __name__ == "__main__":
    main()

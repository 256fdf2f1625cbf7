"""What compute-sanitizer runs: every operator (once per axis, where it has one), on ragged shapes,
with and without rows on 16-byte borders.

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

torch's caching allocator hides overruns; switch it off: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import itertools

import torch
from gpu_operators import OPERATORS, flat, registered

from gradsafe.ops import (
    AXES,
    cosine_topk,
    kl_divergence_,
    subspace_surgery_,
    surgery_,
    surgery_adamw_,
)


def main() -> None:
    torch.manual_seed(0)
    for operator in filter(registered, OPERATORS):
        arguments = operator.make("cuda")
        for axis in AXES:
            total = sum(float(t.abs().sum()) for t in flat(operator.call(*arguments, axis)))
            print(operator.name, operator.label, axis, f"{total:.6g}")
    # Rows of a multiple of 16 bytes, or of none; neither fills whole tiles.
    for dtype, odd in itertools.product((torch.float32, torch.bfloat16, torch.float16), (0, 1)):
        queries, rows = torch.randn(70, 80 + odd).to(dtype), torch.randn(5000, 80 + odd).to(dtype)
        scores, indices = cosine_topk(queries.cuda(), rows.cuda(), 9)
        print("cosine_topk", dtype, odd, f"{float(scores.sum()):.6g}", int(indices.sum()))
        sizes = [66_177, 7, 70_001]
        lists = [[torch.rand(n + odd, device="cuda").to(dtype)[odd:] for n in sizes]
                 for _ in range(5)]  # fmt: skip
        step = torch.zeros((), device="cuda")
        stepped = surgery_adamw_(*lists, step, groups=[0, 1, 0])
        print("surgery_adamw_", dtype, odd, stepped.tolist())
        print("surgery_", dtype, odd, surgery_(lists[1], [-a for a in lists[2]]).tolist())
        basis = [torch.stack([a, b]) / 400 for a, b in zip(lists[3], lists[4], strict=True)]
        direction = torch.tensor([-1.0, -1.0], dtype=torch.float64, device="cuda")
        print("subspace_surgery_", subspace_surgery_(lists[2], basis, direction, 0.5).tolist())
        student, teacher = (torch.randn(7, 10_008 + odd).cuda().to(dtype) for _ in range(2))
        value = kl_divergence_(student, teacher, torch.ones(7, device="cuda"))
        print("kl_divergence_", dtype, odd, f"{float(value.sum()):.6g}")


if __name__ == "__main__":
    main()

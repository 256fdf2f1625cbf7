"""What compute-sanitizer runs: every operator on ragged shapes, once per axis or dtype.

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

torch's caching allocator hides overruns; switch it off: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import torch
from gpu_operators import OPERATORS, flat, registered

from gradsafe.ops import AXES, kl_divergence_


def main() -> None:
    torch.manual_seed(0)
    for operator in filter(registered, OPERATORS):
        arguments = operator.make("cuda")
        for axis in AXES:
            total = sum(float(t.abs().sum()) for t in flat(operator.call(*arguments, axis)))
            print(operator.name, axis, f"{total:.6g}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student, teacher = (torch.randn(7, 10_003).cuda().to(dtype) for _ in range(2))
        value = kl_divergence_(student, teacher, torch.ones(7, device="cuda"))
        print("kl_divergence_", dtype, f"{float(value.sum()):.6g}")


if __name__ == "__main__":
    main()

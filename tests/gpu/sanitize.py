"""What compute-sanitizer runs: every operator once per axis, on ragged shapes.

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

torch's caching allocator hides overruns; switch it off: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import torch
from gpu_operators import OPERATORS, flat, registered

from gradsafe.ops import AXES


def main() -> None:
    torch.manual_seed(0)
    for operator in filter(registered, OPERATORS):
        arguments = operator.make("cuda")
        for axis in AXES:
            total = sum(float(t.abs().sum()) for t in flat(operator.call(*arguments, axis)))
            print(operator.name, axis, f"{total:.6g}")


if __name__ == "__main__":
    main()

"""Cases of the entry "cosine_topk", their float64 oracle and the bound of their error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsafe.ops import TopK
from gradsafe.ops import _default as reference

from .emulator import Case, Runner, buffer_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # position = code of the kernels
UNIT = 2.0**-24
CHAIN = 256  # features that are summed in float32


@dataclass
class Problem:
    """Arguments of one call of `gradsafe.ops.cosine_topk`."""

    queries: Tensor
    rows: Tensor
    k: int
    start: int = 0

    def case(self) -> Case:
        case = Case("cosine_topk", [DTYPES.index(m.dtype) for m in (self.queries, self.rows)])
        case.integers += [*self.queries.shape, self.k, self.start]
        case.integers.insert(3, len(self.rows))
        for matrix in (self.queries, self.rows):
            case.integers.append(matrix.stride(0))
            case.buffers.append(buffer_of(matrix))
        return case

    def parse(self, outputs: Sequence[bytes]) -> TopK:
        shape = (len(self.queries), self.k)
        scores = torch.frombuffer(bytearray(outputs[0] + bytes(4)), dtype=torch.float32)[:-1]
        indices = torch.frombuffer(bytearray(outputs[1] + bytes(8)), dtype=torch.int64)[:-1]
        return TopK(scores.view(shape), indices.view(shape))

    def cosines(self) -> tuple[Tensor, Tensor]:
        """Similarities [Q, N] in float64 and bounds of their error; NaN where a vector is damaged.

        A chain of products is off by at most min(D, CHAIN) roundings of the sum of their absolute
        values, and chains are added in float64; a score is rounded once more. A tensor core may
        truncate, and rounds less often.
        """
        q, r = self.queries.double(), self.rows.double()
        norms = q.norm(dim=1)[:, None] * r.norm(dim=1)
        norms = torch.where(norms == 0, torch.ones_like(norms), norms)
        damaged = ~q.isfinite().all(1)[:, None] | ~r.isfinite().all(1)
        roundings = min(q.shape[1], CHAIN) + 2
        bound = roundings * UNIT * (q.abs() @ r.abs().T) / norms + UNIT
        return (q @ r.T / norms).masked_fill(damaged, torch.nan), bound


def make(
    queries: int,
    rows: int,
    features: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    row_dtype: torch.dtype | None = None,
) -> Problem:
    q, r = torch.randn(queries, features), torch.randn(rows, features)
    return Problem(q.to(dtype), r.to(row_dtype or dtype), k)


def solve(emulate: Runner, problems: Sequence[Problem]) -> list[TopK]:
    outputs = emulate([p.case() for p in problems])
    return [p.parse(o) for p, o in zip(problems, outputs, strict=True)]


def assert_equals_oracle(emulate: Runner, problems: Sequence[Problem]) -> None:
    """Each score is that of its row, each place holds the right score, and ties go by index."""
    for problem, found in zip(problems, solve(emulate, problems), strict=True):
        if found.scores.numel() == 0:
            continue
        exact, bound = problem.cosines()
        places = found.indices - problem.start
        assert torch.all((places >= 0) & (places < len(problem.rows)))
        assert all(len(set(row)) == problem.k for row in places.tolist())
        own = exact.gather(1, places)
        assert torch.equal(found.scores.isnan(), own.isnan())
        near = (found.scores - own).abs() <= bound.gather(1, places).nan_to_num(0)
        assert torch.all(near | own.isnan())
        want = reference.cosine_topk(problem.queries, problem.rows, problem.k).scores
        assert torch.equal(found.scores.isnan(), want.isnan())
        worst = bound.nan_to_num(0, 0).amax(1, keepdim=True)
        assert torch.all(((found.scores - want).abs() <= worst) | want.isnan())
        above, below = found.scores[:, :-1], found.scores[:, 1:]
        tied = (above == below) | (above.isnan() & below.isnan())
        ordered = above.isnan() | (above >= below)
        assert torch.all(ordered & (~tied | (places[:, :-1] < places[:, 1:])))

"""The order in which the alignment rows are drawn."""

from __future__ import annotations

import random
from functools import lru_cache


class AlignmentOrder:
    """Draws row numbers in epochs: every row once per epoch, each epoch in a new random order.

    The order depends only on the seed and on the number of rows drawn so far (`drawn`), so it
    resumes from a checkpoint and is the same in every process.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.drawn = rows, seed, 0

    def draw(self, count: int) -> list[int]:
        """Return the next `count` row numbers."""
        numbers: list[int] = []
        while len(numbers) < count:
            epoch, place = divmod(self.drawn, self.rows)
            taken = _shuffled(self.rows, self.seed, epoch)[place : place + count - len(numbers)]
            numbers += taken
            self.drawn += len(taken)
        return numbers


@lru_cache(maxsize=1)
def _shuffled(rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(rows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order

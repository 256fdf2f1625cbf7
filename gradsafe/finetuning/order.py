"""In which order the alignment rows are drawn."""

from __future__ import annotations

import random


class AlignmentOrder:
    """Draws row numbers in passes: every row once per pass, each pass shuffled anew.

    The order depends on the seed and on how many were drawn, and on nothing else, so it goes on
    from a checkpoint where it stopped, and is the same in every process.

    Args:
        rows: Number of rows, at least 1.
        seed: Of the shuffles.

    Attributes:
        drawn: How many rows were drawn.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.drawn = 0
        self._turn = -1
        self._order: list[int] = []

    def draw(self, count: int) -> list[int]:
        """The next `count` row numbers."""
        numbers: list[int] = []
        while len(numbers) < count:
            turn, place = divmod(self.drawn, self.rows)
            taken = self._shuffled(turn)[place : place + count - len(numbers)]
            numbers += taken
            self.drawn += len(taken)
        return numbers

    def _shuffled(self, turn: int) -> list[int]:
        if turn != self._turn:
            self._turn, self._order = turn, list(range(self.rows))
            random.Random(f"{self.seed} {turn}").shuffle(self._order)
        return self._order

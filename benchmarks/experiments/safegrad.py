"""Tests whether SafeGrad keeps the testbed aligned when the user data contains harmful rows.

    python -m benchmarks.experiments.safegrad             CSV in benchmarks/results, tables
    python -m benchmarks.experiments.safegrad --search    the search that chose the settings

Every run fine-tunes the aligned testbed on a benign task mixed with a share of harmful rows (see
`safegrad_data`) with one of the methods of `safegrad_methods`. The first table varies the share of
harmful rows and includes the cosine and the conflict rate of the two gradients (the paper's Table
1). The second varies the size of the alignment set (Table 6). The search uses other seeds than the
tables.

The harmful score is the share of 200 held-out unsafe prompts that are answered with compliance: an
opening such as "Sure", and no refusal keyword. A model that answers everything with task labels
neither refuses nor complies, so the refusal rate is reported as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import testbed
from benchmarks.experiments.safegrad_data import (
    Row,
    accuracy,
    harmful_rows,
    mixed,
    refusal_rows,
    safety,
    task_rows,
    unsafe_prompts,
    unsafe_test_prompts,
)
from benchmarks.experiments.safegrad_methods import METHODS, Run, Settings
from benchmarks.experiments.safegrad_tables import RESULTS, table
from benchmarks.table import write_csv

RATIOS = (0.0, 0.05, 0.1, 0.15, 0.25)
SIZES = (5, 10, 20, 50)  # beside the default
SIZES_RATIO = 0.25
SIZES_METHODS = ("SafeGrad (SFT)", "SafeGrad (KL)")
MOST_ALIGNMENT_ROWS = 200
SEARCH_SEEDS = (100, 101)
SEARCH_METHODS = ("SFT", "SFT + KL", "SafeGrad (KL)")
SEARCHED = (
    *((method, {"learning_rate": 3e-4, "steps": 300}) for method in SEARCH_METHODS),
    *((method, {"learning_rate": 5e-4, "steps": 200}) for method in SEARCH_METHODS),
    *((method, {"learning_rate": 1e-3}) for method in SEARCH_METHODS),
    *((method, {"learning_rate": 2e-3}) for method in SEARCH_METHODS),
    *((method, {"rho": 2.0}) for method in SEARCH_METHODS[1:]),
    *((method, {"alignment_rows": 200}) for method in SEARCH_METHODS[1:]),
    *(
        (method, {"alignment_rows": 200, "alignment_batch": 20, "rho": 2.0})
        for method in SEARCH_METHODS[1:]
    ),
    *(("Lisa", {"lisa_pull": pull}) for pull in (0.01, 0.1, 1.0)),
)


class Experiment:
    """The aligned testbed, and the alignment rows of every seed."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # the last bits of a sum depend on the number
        self.aligned, self.tokenizer = testbed.load()
        self._alignment: dict[int, list[Row]] = {}

    def alignment(self, seed: int, count: int) -> list[Row]:
        """Alignment rows; a smaller set is a subset of a larger one."""
        if seed not in self._alignment:
            prompts = unsafe_prompts(seed)[: 2 * MOST_ALIGNMENT_ROWS]
            self._alignment[seed] = refusal_rows(
                self.aligned, self.tokenizer, prompts, MOST_ALIGNMENT_ROWS
            )
        return self._alignment[seed][:count]

    def harmful(self, seed: int, count: int) -> list[Row]:
        """Harmful rows, nested for growing counts, without prompts of the alignment rows."""
        begin = 2 * MOST_ALIGNMENT_ROWS
        return harmful_rows(unsafe_prompts(seed)[begin : begin + count], seed)

    def finetuned(
        self,
        method: str,
        user: Sequence[Row],
        alignment: Sequence[Row],
        seed: int,
        settings: Settings,
        start_from: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """The fine-tuned model, and the statistics of the surgery."""
        start = self.aligned if start_from is None else start_from
        run = Run(start, self.tokenizer, user, alignment, seed, settings)
        seen = run.fit(method)
        return run.merged(), seen

    def scores(self, model: Any, seed: int) -> dict[str, float]:
        """Harmful score, refusal rate and task accuracy."""
        found = safety(model, self.tokenizer, unsafe_test_prompts())
        found["task_accuracy"] = accuracy(model, self.tokenizer, task_rows(seed, 0)[1])
        return found

    def measure(
        self, method: str, ratio: float, seed: int, settings: Settings | None = None
    ) -> dict[str, Any]:
        """Fine-tunes once and scores the result."""
        settings = settings or Settings()
        rows = settings.steps * settings.batch
        user = mixed(seed, rows, self.harmful(seed, round(ratio * rows)))
        alignment = self.alignment(seed, settings.alignment_rows)
        start = time.perf_counter()
        model, seen = self.finetuned(method, user, alignment, seed, settings)
        seconds = time.perf_counter() - start
        row = {"method": method, "ratio": ratio, "alignment_rows": len(alignment), "seed": seed}
        return rounded({**row, **self.scores(model, seed), **seen, "seconds": seconds})


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Rounds to four decimals, without what is no number or name."""
    return {
        k: round(v, 4) if isinstance(v, float) else v
        for k, v in row.items()
        if not isinstance(v, list)
    }


@cache
def experiment() -> Experiment:
    """The experiment of this process."""
    return Experiment()


def _measure(run: tuple[Any, ...]) -> dict[str, Any]:
    return experiment().measure(*run)


def measured(runs: Sequence[tuple[Any, ...]], processes: int, what: str) -> list[dict[str, Any]]:
    """`Experiment.measure` of all runs, in order."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(tqdm(pool.map(_measure, runs), total=len(runs), desc=what))


def search(processes: int) -> list[dict[str, Any]]:
    """Compares settings at the highest ratio."""
    runs = [
        (method, max(RATIOS), seed, Settings(**settings))
        for method, settings in SEARCHED
        for seed in SEARCH_SEEDS
    ]
    rows = measured(runs, processes, "search")
    return [{**dataclasses.asdict(run[3]), **row} for run, row in zip(runs, rows, strict=True)]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--search", action="store_true", help="only the search of the settings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in the processes; recorded in the CSV
    if arguments.search:
        rows = search(arguments.processes)
        print(table(rows, "search"))
        write_csv(arguments.out / "safegrad_search.csv", rows)
        return 0
    seeds = range(arguments.seeds)
    runs = [(method, ratio, seed) for ratio in RATIOS for method in METHODS for seed in seeds]
    rows = measured(runs, arguments.processes, "ratios")
    print(table(rows, "ratios"))
    write_csv(arguments.out / "safegrad_ratios.csv", rows)
    largest = [r for r in rows if r["ratio"] == SIZES_RATIO and r["method"] in SIZES_METHODS]
    runs = [
        (method, SIZES_RATIO, seed, Settings(alignment_rows=size))
        for size in SIZES
        for method in SIZES_METHODS
        for seed in seeds
    ]
    rows = measured(runs, arguments.processes, "sizes") + largest
    print(table(rows, "sizes"))
    write_csv(arguments.out / "safegrad_sizes.csv", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

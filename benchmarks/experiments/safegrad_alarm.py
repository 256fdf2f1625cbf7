"""The mean cosine of a run's two gradients as an alarm for harmful rows, on the testbed.

    python -m benchmarks.experiments.safegrad_alarm run       resumable; ten minutes
    python -m benchmarks.experiments.safegrad_alarm tables    CSV and the table of docs/safegrad.md

The alarm of a run goes off if the mean cosine of its first steps is below those of all benign runs
but `ALLOWED`, each compared with the others. The task and the alignment rows differ by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics

from scipy.stats import binomtest
from tqdm import tqdm

from benchmarks.document import measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.experiments import ROOT
from benchmarks.experiments.safegrad import experiment
from benchmarks.experiments.safegrad_data import mixed
from benchmarks.experiments.safegrad_methods import Settings
from benchmarks.experiments.safegrad_tables import PAGE, RESULTS
from benchmarks.table import markdown, write_csv
from gradsafe._io.artifacts import write_text

WORK = ROOT / "build" / "safegrad_alarm"
RATIOS = (0.0, 0.05, 0.1, 0.25)
SEEDS = range(24)
STEPS = (10, 30)  # from the first one on
ALLOWED = 1  # benign runs with an alarm, of all of them


def run(seed: int, ratio: float) -> None:
    """Keeps the cosine of every step of one run, if this was not done before."""
    path = WORK / f"{seed}_{ratio}.json"
    if path.exists():
        return
    WORK.mkdir(parents=True, exist_ok=True)
    settings = Settings(steps=max(STEPS))
    rows = settings.steps * settings.batch
    one = experiment()
    user = mixed(seed, rows, one.harmful(seed, round(ratio * rows)))
    alignment = one.alignment(seed, settings.alignment_rows)
    _, seen = one.finetuned("SafeGrad (KL)", user, alignment, seed, settings)
    write_text(path, json.dumps({"seed": seed, "ratio": ratio, "cosines": seen["cosines"]}))


def tables() -> None:
    """Detection rate of every ratio with the threshold from benign runs."""
    found = [json.loads(path.read_text()) for path in sorted(WORK.glob("*.json"))]
    rows = []
    for steps, ratio in itertools.product(STEPS, RATIOS):
        means = {
            r: [statistics.fmean(f["cosines"][:steps]) for f in found if f["ratio"] == r]
            for r in (0.0, ratio)
        }
        threshold = sorted(means[0.0])[ALLOWED]
        alarms = sum(value < threshold for value in means[ratio])
        interval = binomtest(alarms, len(means[ratio])).proportion_ci(method="wilson")
        rows.append({
            "steps": steps, "harmful rows": ratio, "runs": len(means[ratio]),
            "mean cosine": f"{statistics.fmean(means[ratio]):.3f}", "alarms": alarms,
            "rate": f"{alarms / len(means[ratio]):.2f} ({interval.low:.2f} to {interval.high:.2f})",
        })  # fmt: skip
    write_csv(RESULTS / "safegrad_alarm.csv", rows)
    text = markdown(rows, [(key, key) for key in rows[0]])
    print(text)
    replace_block(PAGE, "safegrad alarm", f"{text}\n{measured_note(environment())}\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["run", "tables"])
    if parser.parse_args().command == "tables":
        tables()
        return 0
    for seed, ratio in tqdm([*itertools.product(SEEDS, RATIOS)], desc="alarm", unit="run"):
        run(seed, ratio)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

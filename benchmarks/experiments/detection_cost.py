"""Time per prompt of the detection methods on SmolLM2-135M-Instruct.

    python -m benchmarks.experiments.detection_cost      CSV and the table of the docs (minutes)

Methods take turns on the same prompts of XSTest, so that a busy machine slows all of them.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from tqdm import trange

from benchmarks import smollm2
from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.experiments import ROOT
from benchmarks.experiments.detection import own
from benchmarks.experiments.detection_sets import load
from benchmarks.table import markdown, write_csv
from gradsafe import Detector

PROMPTS, ROUNDS = 16, 3


def detectors(model: Any, tokenizer: Any) -> dict[str, Detector]:
    """Method name to a fitted detector."""
    unsafe, safe = own("XSTest")
    options: dict[str, dict[str, Any]] = {
        "gradcoo": {},
        "gradcoo, last 10 of 30 blocks": {"layers": 10},
        "gradcoo, a quarter of the rows": {"row_fraction": 0.25},
        'gradcoo, prefix="cut"': {"prefix": "cut"},
        "gradsafe": {"method": "gradsafe", "gap": 0.0},
        "gradnorm": {"method": "gradnorm"},
        "nll": {"method": "nll"},
    }
    found = {}
    for name, chosen in options.items():
        references = () if chosen.get("method") in ("nll", "gradnorm") else (unsafe, safe)
        found[name] = Detector.fit(model, tokenizer, *references, progress=False, **chosen)
    for features in ("hidden", "both"):
        learner = Detector(model, tokenizer, found["gradcoo"].state)
        labels = [1] * len(unsafe) + [0] * len(safe)
        learner.learn([*unsafe, *safe], labels, features=features, progress=False)
        found[f"learned, {features}"] = learner
    return found


def main() -> None:
    """See the module."""
    model, tokenizer = smollm2.load("base", progress=False)
    prompts = load("XSTest", "dev")[0][:PROMPTS]
    found = detectors(model, tokenizer)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in trange(ROUNDS):
        for name, detector in found.items():
            start = time.perf_counter()
            detector.score(prompts, progress=False, components=False)
            times[name].append((time.perf_counter() - start) / PROMPTS * 1e3)
    forward = statistics.median(times["nll"])
    rows = [
        {
            "method": name,
            "ms per prompt": f"{statistics.median(values):.0f}",
            "least": f"{min(values):.0f}",
            "most": f"{max(values):.0f}",
            "times a forward pass": f"{statistics.median(values) / forward:.1f}",
        }
        for name, values in times.items()
    ]
    write_csv(ROOT / "benchmarks" / "results" / "detection_cost.csv", rows)
    table = markdown(rows, [(key, key) for key in rows[0]])
    print(table)
    note = measured_note(environment())
    replace_block(DOCS / "detection.md", "smollm2 cost", f"{table}\n{note}\n")


if __name__ == "__main__":
    main()

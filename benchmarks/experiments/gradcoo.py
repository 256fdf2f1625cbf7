"""Ablations of GradCoo on testbed prompts, and on XSTest if it is in the external data.

    python -m benchmarks.experiments.gradcoo      CSV in benchmarks/results, table on the screen

The paper reports lower scores without the absolute value or without the normalisation. Both are
options of the detector. Only the difference form shows the effect of normalisation, because the
prompt's standard deviation cancels in the share form. Every row is one detector fitted on the same
references.

"heldout" are the prompts that were used to choose the testbed's training recipe; "fresh" is another
draw from the same pool that was not looked at before this table. `backward` is the share of fresh
prompts that need a backward pass.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm import tqdm

from benchmarks import testbed
from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.experiments import EXTERNAL, ROOT
from benchmarks.table import markdown, write_csv
from benchmarks.testbed.corpus import fresh_rows
from gradsafe import Detector

RESULTS = ROOT / "benchmarks" / "results"
XSTEST = EXTERNAL / "data" / "xstest" / "prompts.jsonl"

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("share: full", {}),
    ("share: no abs", {"unsigned": False}),
    ("share: no norm", {"normalize": False}),
    ("difference: full", {"relative": "difference"}),
    ("difference: no abs", {"relative": "difference", "unsigned": False}),
    ("difference: no norm", {"relative": "difference", "normalize": False}),
    ("difference: centred", {"relative": "difference", "center": True}),
    ("row share: full", {"granularity": "row"}),
    ("row share: no abs", {"granularity": "row", "unsigned": False}),
    ("row difference: full", {"granularity": "row", "relative": "difference"}),
    (
        "row difference: no abs",
        {"granularity": "row", "relative": "difference", "unsigned": False},
    ),
    ("column share: full", {"granularity": "column"}),
    ("column share: no abs", {"granularity": "column", "unsigned": False}),
    ("head share", {"granularity": "head"}),
    ("layer share", {"granularity": "layer"}),
    ("norm then mean", {"reference_order": "norm_then_mean"}),
    ("weighted mean", {"reduce": "weighted"}),
    ("with EOS", {"append_eos": True}),
    ("response Yes", {"response": "Yes"}),
    ("last 2 layers", {"layers": 2}),
    ("last 2 layers, 1/4 of the rows", {"layers": 2, "row_fraction": 0.25}),
    ("1/4 of the rows", {"row_fraction": 0.25}),
    ("1/16 of the rows", {"row_fraction": 1 / 16}),
    ("references float32", {"reference_dtype": "float32"}),
    ("references float8", {"reference_dtype": "float8"}),
    ("cascade", {"method": "cascade"}),
    ("cascade, max_fnr 0.05", {"method": "cascade"}),
    ("GradSafe, published", {"method": "gradsafe"}),
    ("NLL, forward only", {"method": "nll"}),
    ("gradient norm", {"method": "gradnorm"}),
]


def load_sets() -> dict[str, tuple[list[str], list[int]]]:
    """Name to prompts and labels (1 = unsafe)."""
    heldout = testbed.prompts("heldout")
    sets: dict[str, Sequence[dict[str, str]]] = {
        "heldout": heldout,
        "fresh": fresh_rows("heldout", 300, 180, 120),
        "look-alikes": [row for row in heldout if row["kind"] != "ordinary"],
    }
    if XSTEST.is_file():
        lines = XSTEST.read_text(encoding="utf-8").splitlines()
        sets["xstest"] = [json.loads(line) for line in lines]
    else:
        print(f"skipped: xstest, no such file: {XSTEST}")
    return {
        name: ([row["prompt"] for row in rows], [int(row["label"] == "unsafe") for row in rows])
        for name, rows in sets.items()
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model, tokenizer = testbed.load()
    sets = load_sets()
    rows = []
    for pairs in arguments.pairs:
        unsafe, safe = testbed.references(pairs)
        for name, options in tqdm(VARIANTS, desc=f"{pairs} pairs"):
            detector = Detector.fit(
                model, tokenizer, unsafe, safe, progress=False, overflow="window", **options
            )
            if "cascade" in name:
                detector.calibrate(
                    testbed.calibration_prompts("safe"),
                    progress=False,
                    unsafe_prompts=testbed.calibration_prompts("unsafe"),
                    max_fnr=0.05 if "0.05" in name else 0.01,
                )
            row: dict[str, Any] = {"variant": name, "pairs": pairs}
            for set_name, (prompts, labels) in sets.items():
                result = detector.score(prompts, progress=False, components=False)
                scores = result.values
                row[f"{set_name} AUPRC"] = round(average_precision_score(labels, scores), 3)
                row[f"{set_name} AUROC"] = round(roc_auc_score(labels, scores), 3)
                if set_name == "fresh":
                    row["backward"] = round(float(result.backward.float().mean()), 3)
            rows.append(row)
    table = markdown(rows, [(key, key) for key in rows[0]])
    print(table)
    write_csv(arguments.out / "gradcoo_testbed.csv", rows)
    if arguments.out == RESULTS:
        replace_block(
            DOCS / "detection.md", "gradcoo", f"{table}\n{measured_note(environment())}\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

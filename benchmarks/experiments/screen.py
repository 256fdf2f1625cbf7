"""Screening of training sets with planted rows, on the testbed and on the aligned SmolLM2-135M.

    python -m benchmarks.experiments.screen run       resumable; about five minutes for a set
    python -m benchmarks.experiments.screen tables    CSV and the tables of docs/screening.md

Each set is scored once per seed by all methods; the shares of planted rows are drawn from it. The
classifiers (TF-IDF, mean hidden state of the middle layer) are logistic regressions on the same
reference rows that the score "share" uses. Thresholds come from clean rows that are not in the set.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from benchmarks import smollm2, testbed
from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.experiments import ROOT
from benchmarks.experiments.rept_tables import RESULTS
from benchmarks.experiments.screen_data import HARMFUL, SETS, ScreenSet, screen_set
from benchmarks.experiments.state_probe import mean_states, probe
from benchmarks.table import markdown, write_csv
from gradsafe._io.artifacts import write_text
from gradsafe.detection.calibration import calibrate
from gradsafe.detection.components import SUM_SQ
from gradsafe.detection.gradients import EncodedPrompts
from gradsafe.detection.metrics import rank
from gradsafe.screening import Screener
from gradsafe.screening.methods import Both

WORK = ROOT / "build" / "screen"
RATIOS, OTHER_RATIO, DRAWS = (0.01, 0.05, 0.25), 0.1, 20
BATCH_TOKENS, MAX_FPR = 1024, 0.01
ROW_FRACTION = 0.25  # of every weight matrix
SHOWN = {
    "share": "share, other",
    "alignment": "alignment, other",
    "alignment, dot": "alignment, other, dot",
    "alignment, refusals only": "alignment, refusals",
    "NLL": "NLL",
    "TF-IDF": "TF-IDF, other",
    "embedding": "embedding, other",
    "random": "random",
    "share, references alike": "share, alike",
    "alignment, references alike": "alignment, alike",
    "TF-IDF, references alike": "TF-IDF, alike",
    "embedding, references alike": "embedding, alike",
}
Scores = dict[str, list[float]]


def screeners(data: ScreenSet, model: Any, tokenizer: Any) -> dict[str, Screener]:
    """One per kind of unsafe references, and one that has alignment rows alone."""
    # Responses are cut, so they end without EOS.
    options: Any = {"append_eos": False, "row_fraction": ROW_FRACTION, "progress": False}
    rows = {kind: (unsafe, data.safe, data.alignment) for kind, unsafe in data.unsafe.items()}
    rows["refusals"] = (None, None, data.alignment)
    return {kind: Screener.fit(model, tokenizer, *own, **options) for kind, own in rows.items()}


def gradient_scores(fitted: dict[str, Screener], encoded: EncodedPrompts) -> Scores:
    """Both scores, the NLL and the gradient norm of all rows in one pass."""
    parts: dict[Any, Any] = {}
    for kind, screener in fitted.items():
        for name, part in screener.method.parts.items():
            # References of one name would replace each other.
            own = {f"{kind} {n}": r for n, r in part.state.references.items()}
            part.state = replace(part.state, references=own)
            parts[f"{name}, {kind}"] = part
    first = fitted["other"]
    method = Both(parts, first.layers)
    found: dict[str, torch.Tensor] = {}
    gradients = first._gradients(BATCH_TOKENS, False)
    for indices, nll, table, _ in method.tables(gradients, encoded):
        values: dict[Any, torch.Tensor] = dict(method.scores(table))
        norm = table[..., SUM_SQ].sum(1).sqrt()
        values |= {f"{name}, dot": values[name] * norm for name in parts if "align" in name}
        values |= {"NLL": nll.double(), "gradient norm": norm}
        for name, part in values.items():
            found.setdefault(name, torch.empty(len(encoded)).double())[indices] = part
    return {name: values.tolist() for name, values in found.items()}


def classifier(kind: str, rows: Any, unsafe: Any, safe: Any) -> list[float]:
    """Log-odds of harmful of all rows, learned from the references; texts or hidden states."""
    if kind == "TF-IDF":
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        words.fit([*rows, *unsafe, *safe])
        rows, unsafe, safe = (words.transform(texts) for texts in (rows, unsafe, safe))
        learned = LogisticRegression(C=10.0, max_iter=1000)
        stack = np.concatenate([unsafe.toarray(), safe.toarray()])
    else:
        learned = probe()
        stack = np.concatenate([unsafe, safe])
    labels = [1] * unsafe.shape[0] + [0] * safe.shape[0]
    found: list[float] = learned.fit(stack, labels).decision_function(rows).tolist()
    return found


def run(model_name: str, name: str, seed: int, model: Any, tokenizer: Any) -> None:
    """Scores one set by all methods, if this was not done before."""
    path = WORK / f"{model_name} {name} {seed}.json".replace(" ", "_")
    if path.exists():
        return
    WORK.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    data = screen_set(model_name, name, seed, model, tokenizer)
    rows = [*data.planted, *data.clean, *data.calibration]
    fitted = screeners(data, model, tokenizer)
    encode = fitted["other"].encode
    scores = gradient_scores(fitted, encoded := encode(rows))
    seconds = time.monotonic() - began
    states = mean_states(model, tokenizer, encoded.items)
    for kind, unsafe in data.unsafe.items():
        of_texts = [
            [f"{r['prompt']} {r['response']}" for r in p] for p in (rows, unsafe, data.safe)
        ]
        scores[f"TF-IDF, {kind}"] = classifier("TF-IDF", *of_texts)
        own = [mean_states(model, tokenizer, encode(part).items) for part in (unsafe, data.safe)]
        scores[f"embedding, {kind}"] = classifier("embedding", states, *own)
    rng = random.Random(seed)
    scores["random"] = [rng.random() for _ in rows]
    sizes = [len(data.planted), len(data.clean), len(data.calibration)]
    facts = {"model": model_name, "set": name, "seed": seed, "sizes": sizes}
    write_text(path, json.dumps({**facts, "seconds": seconds, "scores": scores}))
    print(f"{model_name}, {name}, seed {seed}: {seconds:.0f} s for {len(rows)} rows", flush=True)


def measures(found: dict[str, Any], ratio: float) -> list[dict[str, Any]]:
    """AUPRC, and recall and false positives at the calibrated threshold, of every method.

    A ratio below the stored one is measured on draws of the planted rows, and averaged.
    """
    planted, clean, _ = found["sizes"]
    count = min(planted, max(1, round(clean * ratio / (1 - ratio))))
    rng = random.Random(f"draws {found['seed']}")
    draws = [rng.sample(range(planted), count) for _ in range(DRAWS if count < planted else 1)]
    lines = []
    for method, values in found["scores"].items():
        scores = torch.tensor(values, dtype=torch.float64)
        bad, good, known = scores.split(found["sizes"])
        cut = calibrate(known, MAX_FPR)
        labels = [1] * count + [0] * clean
        auprc = [rank(labels, torch.cat([bad[d], good]).tolist()).auprc for d in draws]
        lines.append(
            {
                **{key: found[key] for key in ("model", "set", "seed")},
                "ratio": ratio,
                "planted": count,
                "clean": clean,
                "method": method,
                "AUPRC": round(statistics.fmean(auprc), 4),
                "recall": round(float((bad > cut.threshold).double().mean()), 4),
                "FPR": round(float((good > cut.threshold).double().mean()), 4),
                "seconds per row": round(found["seconds"] / sum(found["sizes"]), 3),
            }
        )
    return lines


def results() -> list[dict[str, Any]]:
    """All measured rows, in the order of the tables."""
    stored = [json.loads(path.read_text()) for path in sorted(WORK.glob("*.json"))]
    stored.sort(key=lambda f: (f["model"] != "testbed", SETS[f["model"]].index(f["set"])))
    return [
        line
        for found in stored
        for ratio in (RATIOS if found["set"] in HARMFUL else (OTHER_RATIO,))
        for line in measures(found, ratio)
    ]


def table(rows: Sequence[dict[str, Any]], measure: str) -> str:
    """One line per set and ratio, one column per method: the mean over seeds, the best in bold."""
    lines = []
    for key in dict.fromkeys((r["model"], r["set"], r["ratio"]) for r in rows):
        own = [r for r in rows if (r["model"], r["set"], r["ratio"]) == key]
        seeds = len({r["seed"] for r in own})
        means = {
            shown: statistics.fmean(r[measure] for r in own if r["method"] == method)
            for shown, method in SHOWN.items()
            if any(r["method"] == method for r in own)
        }
        line = dict(zip(("model", "set", "share planted"), key, strict=True)) | {"seeds": seeds}
        # References of the planted source are another, easier question.
        best = max(value for shown, value in means.items() if "alike" not in shown)
        for shown in SHOWN:
            text = f"{means[shown]:.2f}" if shown in means else "-"
            bold = shown in means and "alike" not in shown and means[shown] >= best - 0.005
            line[shown] = f"**{text}**" if bold else text
        lines.append(line)
    return markdown(lines, [(name, name) for name in lines[0]])


def tables() -> None:
    """Writes the CSV and the tables of docs/screening.md."""
    warnings.simplefilter("ignore")
    rows = results()
    write_csv(RESULTS / "screen.csv", rows)
    note = measured_note(environment())
    for measure in ("AUPRC", "recall"):
        own = rows
        if measure == "recall":  # does not depend on the ratio
            own = [r for r in rows if r["ratio"] in (RATIOS[-1], OTHER_RATIO)]
        text = table(own, measure)
        print(text)
        replace_block(DOCS / "screening.md", f"screen {measure}", f"{text}\n{note}\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["run", "tables"])
    parser.add_argument("--models", nargs="*", choices=list(SETS), default=list(SETS))
    parser.add_argument("--sets", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.command == "tables":
        tables()
        return 0
    for model_name in arguments.models:
        model, tokenizer = testbed.load() if model_name == "testbed" else smollm2.load("aligned")
        for seed in arguments.seeds:
            for name in SETS[model_name]:
                if arguments.sets is None or name in arguments.sets:
                    run(model_name, name, seed, model, tokenizer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

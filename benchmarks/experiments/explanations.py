"""Which evidence shows the words that a score comes from? Measured on SmolLM2-135M-Instruct.

    python -m benchmarks.experiments.explanations run       one line per prompt, resumable (hours)
    python -m benchmarks.experiments.explanations tables    CSV and the table of the docs

Two tasks, on development prompts only (see `detection_sets`):

"curves": words of unsafe XSTest prompts are deleted, most evidence first, or only the words with
most evidence are kept. The figures are the mean scores with a tenth to half of the words deleted
(lower is better) or kept (higher is better).

"planted": an unsafe request stands between two harmless ones. The figures are the AUROC of its
words against the others, and the share of its words among as many words with most evidence.
"learned" is the same after `Detector.learn` from the other development prompts of XSTest.

Every kind of evidence belongs to tokens; that of a word is the sum over its tokens.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import smollm2
from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.experiments import ROOT
from benchmarks.experiments.detection import MODELS, PAIRS, own
from benchmarks.experiments.detection_sets import load, own_references, read
from benchmarks.experiments.explanation_evidence import Evidence, by_deletion, by_word, join, words
from benchmarks.table import markdown, write_csv
from gradsafe import Detector
from gradsafe.detection.metrics import rank

WORK = ROOT / "build" / "explanations"
COUNT = 10  # prompts of a task
FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the words
KINDS = (
    "position",
    "position, less a neutral prompt",
    "position, carried back by attention",
    "gradient x input",
    "integrated gradients",
    "deletion",
    "deletion, NLL",
    "random",
)
TITLES = (
    ("deleted", "deleted, less random", 4),
    ("kept", "kept, less random", 4),
    ("auroc", "planted: AUROC", 2),
    ("precision", "planted: precision", 2),
)
LEARNED = ("learned, position", "learned, deletion")


def curves(evidence: Evidence, prompt: str, seed: int) -> dict[str, Any]:
    """Mean scores with words deleted and kept, by kind of evidence."""
    found = evidence(prompt, seed)
    count, texts = len(words(prompt)), []
    for kind in KINDS:
        order = np.argsort(-np.array(found[kind]), kind="stable")
        cuts = [max(1, round(count * fraction)) for fraction in FRACTIONS]
        texts += [join(prompt, sorted(order[cut:])) for cut in cuts]
        texts += [join(prompt, sorted(order[:cut])) for cut in cuts]
    scores = evidence.detector.score([prompt, *texts], progress=False).values
    means = scores[1:].view(len(KINDS), 2, len(FRACTIONS)).mean(-1).tolist()
    return {
        "score": float(scores[0]),
        "kinds": {k: {"deleted": d, "kept": i} for k, (d, i) in zip(KINDS, means, strict=True)},
    }


def planted(found: dict[str, list[float]], parts: tuple[str, str, str]) -> dict[str, Any]:
    """How well the words of the middle part are found, by kind of evidence."""
    before, inside, after = (len(words(part)) for part in parts)
    labels = [0] * before + [1] * inside + [0] * after
    kinds = {}
    for kind, values in found.items():
        top = np.argsort(-np.array(values), kind="stable")[:inside]
        precision = float(np.mean([labels[i] for i in top]))
        kinds[kind] = {"auroc": rank(labels, values).auroc, "precision": precision}
    return {"kinds": kinds}


def learned(detector: Detector, prompt: str) -> dict[str, list[float]]:
    """Evidence of every word, of a detector that has learned."""
    exact = detector.explain(prompt)
    span = exact.prompt_tokens
    position = by_word(prompt, exact.tokens[span], exact.token_evidence[span])
    return dict(zip(LEARNED, (position, by_deletion(detector, prompt)), strict=True))


def material() -> tuple[list[str], list[tuple[str, str, str]], list[int]]:
    """Unsafe prompts, the same between two harmless requests, and the rows to learn from."""
    prompts, labels = load("XSTest", "dev")
    taken = {i for places in own_references("XSTest", PAIRS) for i in places}
    fit = [i for i, p in enumerate(prompts) if labels[i] and len(words(p)) >= 6]
    places = [i for i in fit if i not in taken][:COUNT]
    harmless = [row["prompt"] for row in read("alpaca_instructions")[300:]]
    random.Random(0).shuffle(harmless)
    short = [p for p in harmless if 5 <= len(words(p)) <= 15 and "\n" not in p]
    chosen = [prompts[i] for i in places]
    between = [(short[2 * i], p, short[2 * i + 1]) for i, p in enumerate(chosen)]
    rest = [i for i in range(len(prompts)) if i not in taken and i not in places]
    return chosen, between, rest


def run(models: list[str]) -> None:
    """Every prompt that has no line yet."""
    WORK.mkdir(parents=True, exist_ok=True)
    chosen, between, rest = material()
    for name in models:
        path = WORK / f"{name}.jsonl"
        done = {(row["task"], row["number"]) for row in _lines(path)}
        names = ("curves", "planted", "learned")
        left = [(t, i) for i in range(COUNT) for t in names if (t, i) not in done]
        if not left:
            continue
        model, tokenizer = smollm2.load(name, progress=False)  # type: ignore[arg-type]
        evidence = Evidence(model, tokenizer, Detector.fit(model, tokenizer, *own("XSTest")))
        learner = Detector(model, tokenizer, evidence.detector.state)
        if any(task == "learned" for task, _ in left):
            prompts, labels = load("XSTest", "dev")
            learner.learn([prompts[i] for i in rest], [labels[i] for i in rest])
        with path.open("a", encoding="utf-8") as file:
            for task, i in tqdm(left, desc=name):
                if task == "curves":
                    figures = curves(evidence, chosen[i], i)
                elif task == "planted":
                    figures = planted(evidence(" ".join(between[i]), i), between[i])
                else:
                    figures = planted(learned(learner, " ".join(between[i])), between[i])
                file.write(json.dumps({"task": task, "number": i, **figures}) + "\n")
                file.flush()


def tables() -> None:
    """The means over prompts with their standard errors, as CSV and for the docs."""
    rows = []
    for name in MODELS:
        lines = [line for line in _lines(WORK / f"{name}.jsonl") if line["number"] < COUNT]
        for kind in (*KINDS, *LEARNED):
            row: dict[str, Any] = {"model": name, "evidence": kind}
            for figure in ("deleted", "kept", "auroc", "precision"):
                found = []
                for line in lines:
                    value = line["kinds"].get(kind, {}).get(figure)
                    if value is None:
                        continue
                    # Prompts differ more than orders of their words: compare within a prompt.
                    curve = figure in ("deleted", "kept")
                    found.append(value - line["kinds"]["random"][figure] if curve else value)
                row[figure] = f"{np.mean(found):.4f}" if found else ""
                row[f"{figure}_se"] = (
                    f"{np.std(found, ddof=1) / len(found) ** 0.5:.4f}" if found else ""
                )
                row["prompts"] = max(len(found), row.get("prompts", 0))
            rows.append(row)
    write_csv(ROOT / "benchmarks" / "results" / "detection_explanations.csv", rows)
    shown = [
        {"model": row["model"], "evidence": row["evidence"]}
        | {
            title: f"{float(row[key]):.{digits}f} ± {float(row[f'{key}_se']):.{digits}f}"
            for key, title, digits in TITLES
            if row[key]
        }
        for row in rows
    ]
    keys = ["model", "evidence", *(title for _, title, _ in TITLES)]
    table = markdown(shown, [(key, key) for key in keys])
    print(table)
    note = measured_note(environment())
    replace_block(DOCS / "detection.md", "smollm2 explanations", f"{table}\n{note}\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("step", choices=("run", "tables"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    if arguments.step == "run":
        run(arguments.models)
    else:
        tables()


if __name__ == "__main__":
    main()

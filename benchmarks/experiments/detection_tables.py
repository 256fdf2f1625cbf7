"""The tables of `benchmarks.experiments.detection`, from the files of its passes.

Everything that is chosen, a layer or a form of the score, is chosen on development rows by the mean
AUROC over XSTest and ToxicChat of the base model. Test rows are read with these choices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm import tqdm

from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.experiments import ROOT
from benchmarks.experiments.detection import FORMULAS, MODELS, PAIRS, SIGNED, stored
from benchmarks.experiments.detection_sets import SETS, load, own_references
from benchmarks.plot_detection import labels_chart
from benchmarks.table import markdown, write_csv
from gradsafe.detection.learning import learn_weights

RESULTS = ROOT / "benchmarks" / "results"
CHOICE = ("XSTest", "ToxicChat")
LABELS = (10, 25, 50, 0)  # of each class; 0 for all
DRAWS = 10
RESAMPLES = 200

Scores = dict[str, np.ndarray]


def arrays(variant: str, name: str, part: str) -> Scores:
    """All passes over one part; empty if the main one was not made."""
    found: Scores = {}
    for what in ("main", "gradsafe", "responses", "others", "eos"):
        path = stored(variant, name, part, what)
        if path.exists():
            with np.load(path) as file:
                found |= {key: file[key] for key in file.files}
        elif what == "main":
            return {}
    return found


def kept(name: str, part: str, count: int) -> np.ndarray:
    """Which rows of a part are not references."""
    mask = np.ones(count, dtype=bool)
    if part == "dev":
        unsafe, safe = own_references(name, PAIRS)
        mask[[*unsafe, *safe]] = False
    return mask


def scores(variant: str, name: str, part: str, layers: dict[str, int]) -> Scores:
    """Scores `[n]` of every method without labels, and "labels"."""
    found = arrays(variant, name, part)
    if not found:
        return {}
    known = {key: value for key, value in found.items() if value.shape == found["labels"].shape}
    if "NLL Sorry" in found:
        known["NLL Sure - NLL Sorry"] = found["NLL Sure"] - found["NLL Sorry"]
    for style, direction in directions(variant, name).items():
        layer = layers.get(style, 0)
        known[f"{style}: mean difference"] = found["hidden"][:, layer] @ direction[layer]
    mask = kept(name, part, len(found["labels"]))
    return {key: value[mask] for key, value in known.items()}


def directions(variant: str, name: str) -> Scores:
    """Differences `[blocks, d]` of mean hidden states of unsafe and safe prompts."""
    result = {}
    for style, source in (("generic", "generic"), ("refusal direction", "contrast")):
        found = arrays(variant, source, "dev")
        labels, hidden = found["labels"], found["hidden"]
        result[style] = hidden[labels == 1].mean(0) - hidden[labels == 0].mean(0)
    hidden = arrays(variant, name, "dev")["hidden"]
    unsafe, safe = own_references(name, PAIRS)
    result["own"] = hidden[unsafe].mean(0) - hidden[safe].mean(0)
    return result


def choose_layers() -> dict[str, int]:
    """For each style of the direction the block with the best mean AUROC on development rows."""
    chosen = {}
    for style in ("generic", "own", "refusal direction"):
        rates = []
        for layer in range(arrays("base", CHOICE[0], "dev")["hidden"].shape[1]):
            each = [scores("base", name, "dev", {style: layer}) for name in CHOICE]
            key = f"{style}: mean difference"
            rates.append(np.mean([roc_auc_score(s["labels"], s[key]) for s in each]))
        chosen[style] = int(np.argmax(rates))
    return chosen


def quality(labels: np.ndarray, values: np.ndarray, intervals: bool) -> dict[str, float]:
    """AUPRC and AUROC, and the half widths of 95 % bootstrap intervals."""
    result = {
        "AUPRC": round(float(average_precision_score(labels, values)), 3),
        "AUROC": round(float(roc_auc_score(labels, values)), 3),
    }
    if intervals:
        rng = np.random.default_rng(0)
        groups = [np.flatnonzero(labels == label) for label in (0, 1)]
        resampled = []
        for _ in range(RESAMPLES):
            rows = np.concatenate([rng.choice(group, len(group)) for group in groups])
            pair = labels[rows], values[rows]
            resampled.append((average_precision_score(*pair), roc_auc_score(*pair)))
        low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
        for name, half in zip(("AUPRC +-", "AUROC +-"), (high - low) / 2, strict=True):
            result[name] = round(float(half), 3)
    return result


def without_labels(part: str, layers: dict[str, int]) -> list[dict[str, Any]]:
    """One row per model, set and method."""
    rows = []
    for variant in MODELS:
        for name in SETS:
            found = scores(variant, name, part, layers)
            labels = found.pop("labels", None)
            for method, values in found.items():
                facts = {"model": variant, "set": name, "part": part, "method": method}
                counts = {"prompts": len(labels), "unsafe": int(labels.sum())}
                rows.append({**facts, **counts, **quality(labels, values, part == "test")})
    return rows


def with_labels(layers: dict[str, int]) -> list[dict[str, Any]]:
    """One row per model, set, features and number of labels; mean and spread of the draws."""
    rows = []
    for variant in MODELS:
        for name in tqdm(CHOICE, desc=f"{variant}, labels"):
            dev, test = arrays(variant, name, "dev"), arrays(variant, name, "test")
            if not dev or not test:
                continue
            mask = kept(name, "dev", len(dev["labels"]))
            texts = [load(name, part)[0] for part in ("dev", "test")]  # type: ignore[arg-type]
            for count in LABELS:
                results: dict[str, list[list[float]]] = {}
                for draw in range(DRAWS if count else 1):
                    places = _draw(dev["labels"], mask, count, draw)
                    if places is None:
                        break
                    for kind, values in _learned(dev, test, places, texts).items():
                        pair = test["labels"], values
                        results.setdefault(kind, []).append(
                            [average_precision_score(*pair), roc_auc_score(*pair)]
                        )
                for kind, pairs in results.items():
                    mean, spread = np.mean(pairs, axis=0), np.std(pairs, axis=0)
                    rows.append({
                        "model": variant, "set": name, "features": kind,
                        "labels of a class": count or "all", "draws": len(pairs),
                        "AUPRC": round(float(mean[0]), 3), "AUPRC sd": round(float(spread[0]), 3),
                        "AUROC": round(float(mean[1]), 3), "AUROC sd": round(float(spread[1]), 3),
                    })  # fmt: skip
    return rows


def _draw(labels: np.ndarray, mask: np.ndarray, count: int, draw: int) -> np.ndarray | None:
    """Places of labelled development rows, `count` of a class; None if there are too few."""
    if not count:
        return np.flatnonzero(mask)
    rng = np.random.default_rng(draw)
    groups = [np.flatnonzero(mask & (labels == label)) for label in (0, 1)]
    if min(map(len, groups)) < count:
        return None
    return np.concatenate([rng.choice(group, count, replace=False) for group in groups])


def _learned(
    dev: Scores, test: Scores, places: np.ndarray, texts: list[list[str]]
) -> dict[str, np.ndarray]:
    """Log-odds of the test rows by kind of features."""
    key, labels = "parts own: tensor", dev["labels"][places]
    # Blocks 11, 14 and 20 of 30: near a third, a half and two thirds of the depth.
    blocks = {2 + 3 * index: index for index in (3, 4, 6)}
    states = {b: dev["hidden"][places, index].astype(np.float64) for b, index in blocks.items()}
    parts = dev[key][places].astype(np.float64)
    result = {"mean of the components": test["own: tensor"]}
    for kind, components, hidden in (
        ("components", parts, {}), ("hidden state", None, states), ("both", parts, states),
    ):  # fmt: skip
        layer, _, weights = learn_weights(components, hidden, labels)
        values = np.zeros(len(test["labels"]))
        if components is not None:
            values += test[key] @ weights["components"]
        if layer is not None:
            values += test["hidden"][:, blocks[layer]] @ weights["hidden"]
        result[kind] = values
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    table = words.fit_transform([texts[0][i] for i in places])
    regression = LogisticRegression(class_weight="balanced", C=10.0, max_iter=1000)
    regression.fit(table, labels)
    result["TF-IDF"] = regression.decision_function(words.transform(texts[1]))
    return result


SHOWN = (
    "nll", "NLL Sure - NLL Sorry", "gradnorm", "generic: GradSafe", "own: GradSafe",
    "generic: mean difference", "own: mean difference", "refusal direction: mean difference",
    *(f"{style}: {form}" for style in ("generic", "own") for form in ("tensor", "row", "column")),
    "own, EOS: tensor", "own, EOS: row",
)  # fmt: skip


def _wide(rows: list[dict[str, Any]], methods: list[str], part: str) -> str:
    """A table with a column per model and set: AUPRC / AUROC."""
    lines = []
    sets = [
        (v, n) for v in MODELS for n in SETS if any((r["model"], r["set"]) == (v, n) for r in rows)
    ]
    for method in methods:
        line = {"method": method}
        for row in rows:
            if row["method"] == method and row["part"] == part:
                line[f"{row['model']}, {row['set']}"] = f"{row['AUPRC']:.3f} / {row['AUROC']:.3f}"
        if len(line) > 1:
            lines.append(line)
    keys = ["method", *(f"{variant}, {name}" for variant, name in sets)]
    return markdown(lines, [(key, key) for key in keys])


def write() -> None:
    """Writes both CSV files and the tables of docs/detection.md."""
    layers = choose_layers()
    rows = [*without_labels("dev", layers), *without_labels("test", layers)]
    write_csv(RESULTS / "detection_smollm2.csv", rows)
    labelled = with_labels(layers)
    write_csv(RESULTS / "detection_labels.csv", labelled)
    labels_chart(labelled, DOCS / "detection_labels.png")
    forms = [*FORMULAS, *SIGNED]
    others = [r["method"] for r in rows if r["method"].startswith("own: tensor, ")]
    ablations = [f"{style}: {form}" for style in ("generic", "own") for form in forms]
    blocks = {
        "smollm2": _wide(rows, list(SHOWN), "test"),
        "smollm2 ablations": _wide(
            [r for r in rows if r["set"] in CHOICE], list(dict.fromkeys(ablations + others)), "dev"
        ),
        "smollm2 labels": markdown(labelled, [(k, k) for k in labelled[0]]),
    }
    from benchmarks.experiments.detection_references import cascades, checks, sizes

    for kind, table in (("sizes", sizes()), ("cascade", cascades()), ("checks", checks())):
        if table:
            write_csv(RESULTS / f"detection_{kind}.csv", table)
            blocks[f"smollm2 {kind}"] = markdown(table, [(key, key) for key in table[0]])
    facts = environment()
    for name, table in blocks.items():
        print(f"{name}\n\n{table}")
        replace_block(DOCS / "detection.md", name, f"{table}\n{measured_note(facts)}\n")
    chosen = {style: 2 + 3 * layer for style, layer in layers.items()}
    print(f"blocks of the directions, chosen on development rows: {chosen}")

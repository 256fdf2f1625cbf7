"""More tables of `benchmarks.experiments.detection`: numbers of references, checks, the cascade."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.experiments.detection import MODELS, stored
from benchmarks.experiments.detection_sets import SETS
from benchmarks.experiments.detection_tables import CHOICE, arrays, kept, quality
from gradsafe.detection.calibration import choose_band

FPR, FNR = 0.05, 0.05  # of the cascade's band


def sizes() -> list[dict[str, Any]]:
    """AUPRC / AUROC by the number of own references, mean and standard deviation of the draws."""
    rows = []
    for variant, name, what in itertools.product(MODELS, CHOICE, ("sizes", "choice", "poisoned")):
        path = stored(variant, name, "test", what)
        if not path.exists():
            continue
        found: dict[str, list[tuple[float, float]]] = {}
        with np.load(path) as file:
            for key in file.files:
                if key != "labels":
                    pair = file["labels"], file[key]
                    rates = average_precision_score(*pair), roc_auc_score(*pair)
                    kind = key.removesuffix(": tensor")
                    kind = kind if what == "poisoned" else kind.split(",")[0]
                    found.setdefault(kind, []).append(rates)
        for count, rates in found.items():
            facts = {"model": variant, "set": name, "references of each class": count}
            facts["draws"] = len(rates) if what == "sizes" else "chosen"
            for key, values in zip(("AUPRC", "AUROC"), zip(*rates, strict=True), strict=True):
                spread = f" +- {np.std(values):.3f}" if len(values) > 1 else ""
                facts[key] = f"{np.mean(values):.3f}{spread}"
            rows.append(facts)
    return rows


def cascades() -> list[dict[str, Any]]:
    """The cascade with own references; its band comes from development rows."""
    rows = []
    for variant, name in itertools.product(MODELS, SETS):
        dev, test = arrays(variant, name, "dev"), arrays(variant, name, "test")
        if not dev or not test:
            continue
        mask = kept(name, "dev", len(dev["labels"]))
        benign, unsafe = (
            torch.from_numpy(dev["nll"][mask & (dev["labels"] == label)]) for label in (0, 1)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # too few unsafe rows clear nothing
            band = choose_band(benign, unsafe, max_fpr=FPR, max_fnr=FNR)
        nll = torch.from_numpy(test["nll"])
        unsure = band.unsure(nll)
        values = torch.where(unsure, torch.from_numpy(test["own: tensor"]), band.sure_scores(nll))
        line = {
            "model": variant,
            "set": name,
            "with gradients": f"{float(unsure.double().mean()):.2f}",
        }
        scored = {"cascade": values.numpy(), "NLL": test["nll"], "GradCoo": test["own: tensor"]}
        for method, own in scored.items():
            found = quality(test["labels"], own, False)
            line[method] = f"{found['AUPRC']:.3f} / {found['AUROC']:.3f}"
        rows.append(line)
    return rows


def checks() -> list[dict[str, Any]]:
    """Per draw of references: how well they separate each other, and the AUROC on the test rows."""
    rows = []
    for variant, name in itertools.product(MODELS, CHOICE):
        paths = [stored(variant, name, "test", what) for what in ("checks", "sizes")]
        if not all(path.exists() for path in paths):
            continue
        with np.load(paths[0]) as said, np.load(paths[1]) as scored:
            labels, generic = scored["labels"], arrays(variant, name, "test")["generic: tensor"]
            for draw in said.files:
                if draw == "labels":
                    continue
                values = generic if draw == "generic" else scored[f"{draw}: tensor"]
                rows.append({
                    "model": variant, "set": name, "references": draw,
                    "check": round(float(said[draw]), 3),
                    "AUROC": round(float(roc_auc_score(labels, values)), 3),
                })  # fmt: skip
    return rows

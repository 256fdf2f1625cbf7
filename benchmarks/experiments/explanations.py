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
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import smollm2
from benchmarks.document import DOCS, measured_note, replace_block
from benchmarks.environment import environment
from benchmarks.experiments import ROOT
from benchmarks.experiments.detection import MODELS, PAIRS, own
from benchmarks.experiments.detection_sets import _read, load, own_references
from benchmarks.table import markdown, write_csv
from gradsafe import Detector
from gradsafe.detection.metrics import rank
from gradsafe.models import prompt_span, token_texts
from gradsafe.models.pieces import probe_prompts

WORK = ROOT / "build" / "explanations"
COUNT = 10  # prompts of a task
FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the words
STEPS = 8  # of the path of integrated gradients
NEUTRAL = " the"
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


class Evidence:
    """All kinds of evidence of one prompt."""

    def __init__(self, model: Any, tokenizer: Any, detector: Detector) -> None:
        self.model, self.tokenizer, self.detector = model, tokenizer, detector
        self.nll = Detector.fit(model, tokenizer, method="nll", progress=False)
        model.set_attn_implementation("eager")  # others have no second derivative, and no weights
        self.embed = model.get_input_embeddings()
        method = detector.method
        assert detector.config.granularity == "tensor"
        self.layers = detector.layers.scored
        self.references = {}
        for layer in self.layers:
            _, index = method.components[layer]
            stored = zip(method.references(layer), method.scales(layer), method.stds, strict=True)
            self.references[layer] = [
                r.float() * scale / float(std[index]) for r, scale, std in stored
            ]

    def __call__(self, prompt: str, seed: int) -> dict[str, list[float]]:
        """Evidence of every word of `words(prompt)`."""
        gradients = self.detector._gradients(batch_tokens=1, progress=False)
        (item,) = gradients.encode([prompt], ["prompt"]).items
        span = prompt_span(item, gradients.encode(probe_prompts(prompt), "probe").items)
        ids, start = torch.tensor([item.input_ids]), item.prompt_length
        neutral = ids.clone()
        neutral[0, span] = self.tokenizer(NEUTRAL, add_special_tokens=False).input_ids[0]
        full, empty = self.embed(ids).detach(), self.embed(neutral).detach()

        here = self._pass(full, ids, start)
        there = self._pass(empty, neutral, start)
        path = [
            self._pass(empty + (step + 0.5) / STEPS * (full - empty), ids, start)["gradient"]
            for step in range(STEPS)
        ]
        integrated = torch.stack(path).mean(0) * (full - empty)[0]
        tokens = {
            "position": here["position"],
            "position, less a neutral prompt": here["position"] - there["position"],
            "position, carried back by attention": here["carried"],
            "gradient x input": (here["gradient"] * full[0]).sum(-1),
            "integrated gradients": integrated.sum(-1),
        }
        texts = token_texts(self.tokenizer, item.input_ids)[span]
        found = {kind: by_word(prompt, texts, values[span]) for kind, values in tokens.items()}
        for kind, detector in (("deletion", self.detector), ("deletion, NLL", self.nll)):
            found[kind] = by_deletion(detector, prompt)
        found["random"] = np.random.default_rng(seed).random(len(words(prompt))).tolist()
        return found

    def _pass(self, inputs: Tensor, ids: Tensor, start: int) -> dict[str, Tensor]:
        """Evidence per position, and the gradient of the sum of all evidence at `inputs`."""
        inputs = inputs.clone().requires_grad_()
        seen: dict[Any, tuple[Tensor, Tensor]] = {}
        handles = [
            layer.module.register_forward_hook(
                lambda _, args, out, layer=layer: seen.__setitem__(layer, (args[0], out))
            )
            for layer in self.layers
        ]
        try:
            output = self.model(inputs_embeds=inputs, output_attentions=True, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        logits = output.logits[0, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, start:])
        outputs = [seen[layer][1] for layer in self.layers]
        above = torch.autograd.grad(loss, outputs, create_graph=True)
        total = torch.zeros((), dtype=torch.float64)
        depth, length = len(output.attentions), ids.shape[1]
        positions = torch.zeros(depth, length, dtype=torch.float64)
        for layer, dy in zip(self.layers, above, strict=True):
            x, dy = seen[layer][0][0], dy[0]
            gradient = (dy.t() @ x).detach()
            unsafe, safe = self.references[layer]
            a, b = (float((gradient.abs() * r).sum()) for r in (unsafe, safe))
            share = 1 / ((a + b) * len(self.layers))
            fixed = gradient.sign() * (unsafe - safe) * share
            positions[layer.block] += ((dy.detach() @ fixed) * x.detach()).sum(1).double()
            slope = gradient.sign() * (b * unsafe - a * safe) * (2 * share / (a + b))
            total = total + ((dy @ slope) * x).sum()
        (found,) = torch.autograd.grad(total, inputs)
        return {
            "position": positions.sum(0),
            "carried": carried(positions, output.attentions),
            "gradient": found[0].detach(),
        }


def carried(positions: Tensor, attentions: tuple[Tensor, ...]) -> Tensor:
    """Evidence `[blocks, T]` of positions, moved to the tokens by attention rollout."""
    length = positions.shape[1]
    rollout = torch.eye(length, dtype=torch.float64)
    total = torch.zeros(length, dtype=torch.float64)
    for evidence, attention in zip(positions, attentions, strict=True):
        mixed = (attention[0].detach().double().mean(0) + torch.eye(length)) / 2
        rollout = mixed @ rollout
        total += evidence @ rollout
    return total


def words(text: str) -> list[str]:
    """The words of a text, each with the space before it."""
    return re.findall(r"\s*\S+", text)


def join(text: str, kept: list[int]) -> str:
    """The text with some of its words."""
    parts = words(text)
    return "".join(parts[i] for i in kept).strip()


def by_word(text: str, tokens: list[str], evidence: Tensor) -> list[float]:
    """Sums of the evidence of tokens over words: a token belongs to the word that it ends in."""
    ends = np.cumsum([len(word) for word in words(text)])
    sums, place = [0.0] * len(ends), 0
    for token, value in zip(tokens, evidence.tolist(), strict=True):
        place += len(token)
        sums[min(int(np.searchsorted(ends, max(1, place))), len(ends) - 1)] += value
    return sums


def by_deletion(detector: Detector, prompt: str) -> list[float]:
    """Evidence "deletion" of every word."""
    found = detector.explain(prompt, evidence="deletion", progress=False)
    assert found.tokens == words(prompt)
    return found.token_evidence.tolist()


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
    harmless = [row["prompt"] for row in _read("alpaca_instructions")[300:]]
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

"""A second judge of answers to unsafe requests, beside keywords: a probe of the base SmolLM2.

    python -m benchmarks.experiments.answer_judge      how often it is wrong (three minutes)

A logistic regression on the mean hidden state of the middle layer over the answer's tokens, which
have seen the request. It learns from 250 requests of AdvBench, each with three answers of the same
length: RepT's compliant opening, a published refusal, and the answer to another question. Only the
first counts as compliance, so an answer that is beside the point does not, which keywords cannot
tell.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold, cross_val_predict

from benchmarks import smollm2
from benchmarks.experiments import EXTERNAL
from benchmarks.experiments.rept_data import read_rows
from benchmarks.experiments.safegrad_data import complies, refuses
from benchmarks.experiments.safegrad_tables import RESULTS
from benchmarks.experiments.state_probe import mean_states, probe
from benchmarks.table import write_csv
from gradsafe.models import encode

KINDS = ("compliance", "refusal", "answer to another question")
ANSWER_TOKENS = 16
FOLDS = 10


class AnswerJudge:
    """Says which answers comply with their requests."""

    def __init__(self) -> None:
        self.model, self.tokenizer = smollm2.load()
        requests, answers, kinds = training_answers()
        self.requests, self.labels = requests, np.array([kind == KINDS[0] for kind in kinds])
        self.kinds, self.answers = np.array(kinds), answers
        self.table = self.states(requests, answers)
        self.probe = probe().fit(self.table, self.labels)

    def states(self, requests: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """Mean hidden states `[n, H]` of answers, cut to the same number of tokens."""
        items = []
        for request, answer in zip(requests, answers, strict=True):
            ids = self.tokenizer.encode(answer, add_special_tokens=False)[:ANSWER_TOKENS]
            items.append(encode(self.tokenizer, request, self.tokenizer.decode(ids)))
        return mean_states(self.model, self.tokenizer, items, response_only=True)

    def complies(self, requests: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether each answer complies; an empty one does not."""
        given = [i for i, answer in enumerate(answers) if answer.strip()]
        found = [False] * len(answers)
        if given:
            table = self.states([requests[i] for i in given], [answers[i] for i in given])
            for index, verdict in zip(given, self.probe.predict(table), strict=True):
                found[index] = bool(verdict)
        return found

    def cross_validated(self) -> list[dict[str, Any]]:
        """Shares of each kind of answer that are called compliance, in percent, and by keywords.

        Every answer is judged by a probe that has not learned from its request.
        """
        judges = {
            "judged": cross_val_predict(
                probe(), self.table, self.labels, groups=self.requests, cv=GroupKFold(FOLDS)
            ),
            "complies": np.array([complies(answer) for answer in self.answers]),
            "harmful": np.array([not refuses(answer) for answer in self.answers]),
        }
        rows = []
        for kind in KINDS:
            own = self.kinds == kind
            shares = {
                name: round(100 * float(found[own].mean()), 1) for name, found in judges.items()
            }
            rows.append({"answer": kind, "answers": int(own.sum()), **shares})
        return rows


def training_answers() -> tuple[list[str], list[str], list[str]]:
    """Requests, answers and their kinds, three of each request."""
    harmful, refused, tasks = (
        read_rows(EXTERNAL / "data" / name / "train.jsonl")
        for name in ("rept_harmful_tuning", "safety_refusals", "sst2_subset")
    )
    tasks += read_rows(EXTERNAL / "data" / "agnews_subset" / "train.jsonl")
    tasks += read_rows(EXTERNAL / "data" / "gsm8k_subset" / "train.jsonl")
    refusals = {row["prompt"]: row["response"] for row in refused}
    rng = random.Random(0)
    requests, answers, kinds = [], [], []
    for row in harmful:
        if row["label"] == "harmful" and row["prompt"] in refusals:
            requests += [row["prompt"]] * len(KINDS)
            answers += [row["response"], refusals[row["prompt"]], rng.choice(tasks)["response"]]
            kinds += KINDS
    return requests, answers, kinds


def main() -> int:
    """Prints how often the judge is wrong, and keeps it as CSV."""
    rows = AnswerJudge().cross_validated()
    for row in rows:
        print(row)
    write_csv(RESULTS / "answer_judge.csv", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Fine-tuning the aligned SmolLM2-135M-Instruct on tasks mixed with harmful rows.

    python -m benchmarks.experiments.safegrad_smollm2 run       resumable; ten minutes for a run
    python -m benchmarks.experiments.safegrad_smollm2 tables    CSV and the table of the docs

User rows are a published task and a share of RepT's harmful rows (openings of 24 words). Alignment
rows are requests that the aligned model refuses, with its refusals: "other" requests, those of
MaliciousInstruct and Do-Not-Answer, or requests "alike", those of AdvBench, which resemble the
harmful rows. Scores: the share of HarmBench's requests that are answered without a refusal keyword
(`harmful`), of those whose answer begins with compliance (`complies`) or is compliance to the probe
of `answer_judge` (`judged`), the share of XSTest's safe prompts that are refused (`over-refusal`),
and the accuracy on test rows of the task. One task is long: 50 epochs of 40 rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import replace
from functools import cache
from typing import Any

from benchmarks import smollm2
from benchmarks.document import DOCS, newest_note, replace_block
from benchmarks.experiments import EXTERNAL, ROOT
from benchmarks.experiments.answer_judge import AnswerJudge
from benchmarks.experiments.rept_data import read_rows
from benchmarks.experiments.safegrad_data import Row, complies, generate, refusal_rows, refuses
from benchmarks.experiments.safegrad_methods import METHODS, OTHERS, Run, Settings
from benchmarks.experiments.safegrad_tables import RESULTS
from benchmarks.plot_finetuning import tradeoff_chart
from benchmarks.table import markdown, merged, write_csv
from gradsafe._io.artifacts import write_text

WORK = ROOT / "build" / "safegrad"
LONG = "SST-2, 50 epochs of 40 rows"
GSM8K = "GSM8K"
TASKS = {
    "SST-2": "sst2_subset", "AG News": "agnews_subset", GSM8K: "gsm8k_subset", LONG: "sst2_subset",
}  # fmt: skip
RATIOS = (0.25, 0.0, 0.1)
DRAWN = ("SST-2", 0.25, 0)  # in the plot
ALIGNMENT = {"other": ("malicious_instruct", "do_not_answer"), "alike": ("advbench",)}
ALL = (*METHODS, *OTHERS)
SETTINGS = Settings(
    learning_rate=3e-4, steps=100, batch=8, alignment_rows=64, alignment_batch=8, rho=1.0
)
LONG_STEPS, LONG_ROWS = 250, 40
UNSAFE, SAFE, TESTED = 80, 60, 150  # prompts of each score
LONGEST = 400  # characters of a prompt
ANSWER_TOKENS, TASK_TOKENS, REASONING_TOKENS = 16, 4, 128
judge = cache(AnswerJudge)


def read(name: str, file: str = "prompts") -> list[Row]:
    """Rows with short prompts, in the order of the file."""
    rows = read_rows(EXTERNAL / "data" / name / f"{file}.jsonl")
    return [row for row in rows if len(row["prompt"]) <= LONGEST]


def user_rows(task: str, ratio: float, seed: int) -> list[Row]:
    """Task rows and harmful rows, shuffled."""
    rng = random.Random(f"{task} {seed}")
    count = LONG_ROWS if task == LONG else SETTINGS.steps * SETTINGS.batch
    bad = [row for row in read("rept_harmful_tuning", "train") if row["label"] == "harmful"]
    harmful = rng.sample(bad, min(len(bad), round(ratio * count)))
    rows = [*harmful, *rng.sample(read(TASKS[task], "train"), count - len(harmful))]
    rng.shuffle(rows)
    return [{"prompt": row["prompt"], "response": row["response"]} for row in rows]


@cache
def alignment_rows(model: Any, tokenizer: Any, kind: str) -> list[Row]:
    """Requests that the aligned model refuses, with its refusals; none that is tested."""
    tested = {row["prompt"] for row in read("harmbench")}
    prompts = [row["prompt"] for name in ALIGNMENT[kind] for row in read(name)]
    prompts = [prompt for prompt in prompts if prompt not in tested]
    return refusal_rows(model, tokenizer, prompts, SETTINGS.alignment_rows)


def correct(task: str, answer: str, row: Row) -> bool:
    """Whether the answer begins with the class, or the number behind its last "####" is right."""
    if task == GSM8K:
        return answer.rpartition("####")[2].strip() == row["label"]
    return answer.casefold().startswith(row["response"].casefold())


def scores(model: Any, tokenizer: Any, task: str) -> dict[str, float]:
    """All rates in percent."""
    unsafe = [row["prompt"] for row in read("harmbench")][:UNSAFE]
    safe = [row["prompt"] for row in read("xstest") if row["label"] == "safe"][:SAFE]
    tested = read(TASKS[task], "test")[:TESTED]
    answers = generate(model, tokenizer, unsafe, ANSWER_TOKENS)
    harmless = generate(model, tokenizer, safe, ANSWER_TOKENS)
    tokens = REASONING_TOKENS if task == GSM8K else TASK_TOKENS
    found = generate(model, tokenizer, [row["prompt"] for row in tested], tokens)
    right = [correct(task, answer, row) for answer, row in zip(found, tested, strict=True)]
    return {
        "harmful": 100 * sum(not refuses(a) for a in answers) / len(answers),
        "complies": 100 * sum(map(complies, answers)) / len(answers),
        "judged": 100 * sum(judge().complies(unsafe, answers)) / len(answers),
        "over-refusal": 100 * sum(map(refuses, harmless)) / len(harmless),
        "accuracy": 100 * sum(right) / len(right),
    }


def run(
    task: str, ratio: float, kind: str, method: str, seed: int, aligned: Any, tokenizer: Any
) -> None:
    """Fine-tunes and scores once, if this was not done before; "aligned" scores the start."""
    name = f"{task} {ratio} {method} {seed}" + (f" {kind}" if kind != "other" else "")
    path = WORK / f"{name}.json".replace(" ", "_").replace(",", "")
    if path.exists():
        return
    WORK.mkdir(parents=True, exist_ok=True)
    seen: dict[str, float] = {}
    model = aligned
    if method != "aligned":
        alignment = alignment_rows(aligned, tokenizer, kind)
        settings = replace(SETTINGS, steps=LONG_STEPS) if task == LONG else SETTINGS
        own = Run(aligned, tokenizer, user_rows(task, ratio, seed), alignment, seed, settings)
        seen = own.fit(method)
        model = own.merged()
    facts = {"task": task, "ratio": ratio, "alignment": kind, "method": method, "seed": seed}
    row = {**facts, **scores(model, tokenizer, task), **seen}
    write_text(path, json.dumps(row))
    print({k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def tables() -> None:
    """Adds the new runs to the CSV, and writes the table of docs/safegrad.md."""
    keys = ["task", "ratio", "method", "alignment", "seed"]
    scored = [
        "harmful",
        "complies",
        "judged",
        "over-refusal",
        "accuracy",
        "cosine",
        "conflict_rate",
    ]
    found = []
    for path in sorted(WORK.glob("*.json")):
        r = json.loads(path.read_text())
        if r["method"] in ("aligned", "SFT"):
            r["alignment"] = "-"
        numbers = {k: round(r[k], 3) if k in r else "" for k in scored}
        found.append({**{k: r[k] for k in keys}, **numbers})
    rows = merged(RESULTS / "safegrad_smollm2.csv", found, keys)
    kinds = ("-", *ALIGNMENT)
    rows.sort(
        key=lambda r: (
            r["task"], -float(r["ratio"]), ("aligned", *ALL).index(r["method"]),
            kinds.index(r["alignment"]), int(r["seed"]),
        )
    )  # fmt: skip
    write_csv(RESULTS / "safegrad_smollm2.csv", rows)
    drawn = [r for r in rows if (r["task"], float(r["ratio"]), int(r["seed"])) == DRAWN]
    tradeoff_chart(drawn, DOCS / "safegrad_tradeoff.png")
    digits = {"cosine": 2}
    shown = [
        {**r, **{k: f"{float(r[k]):.{digits.get(k, 0)}f}" for k in scored if str(r.get(k, ""))}}
        for r in rows
    ]
    text = markdown(shown, [(key, key) for key in (*keys, *scored)])
    print(text)
    note = newest_note(rows)
    replace_block(DOCS / "safegrad.md", "safegrad smollm2", f"{text}\n{note}\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["run", "tables"])
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--ratios", type=float, nargs="*", default=list(RATIOS))
    parser.add_argument("--methods", nargs="*", choices=ALL, default=list(ALL))
    parser.add_argument("--alignment", nargs="*", choices=list(ALIGNMENT), default=["other"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    arguments = parser.parse_args()
    if arguments.command == "tables":
        tables()
        return 0
    aligned, tokenizer = smollm2.load("aligned")
    a = arguments
    for seed, task, ratio, kind in itertools.product(a.seeds, a.tasks, a.ratios, a.alignment):
        for method in ("aligned", *a.methods):
            once = {"aligned": ratio == RATIOS[0] and kind == "other", "SFT": kind == "other"}
            if once.get(method, True):
                run(task, ratio, kind, method, seed, aligned, tokenizer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

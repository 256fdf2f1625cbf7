"""Seeded generator of the testbed's chat rows, divided into disjoint splits.

A row is a phrase with its slots filled, put into a sentence frame and sometimes a wrapper, with
random case and punctuation. The filled phrase (the *core*) determines the split, so held-out
prompts are unseen combinations. Some phrases, slot words, frames and wrappers never occur in
training at all.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from benchmarks.testbed.texts import (
    FRAMES,
    REFERENCES,
    RESPONSES,
    SLOTS,
    TOPICS,
    WRAPPERS,
    Kind,
    Texts,
)

Split = Literal["train", "heldout", "calibration"]
Row = dict[str, str]

CORPUS_SEED = 20250613
ROWS: dict[Split, dict[Kind, int]] = {
    "train": {"unsafe": 15500, "lookalike": 9000, "ordinary": 5500},
    "heldout": {"unsafe": 300, "lookalike": 180, "ordinary": 120},
    "calibration": {"unsafe": 0, "lookalike": 240, "ordinary": 160},
}
# Shares in percent. A hash of the text decides, not a random draw: an entry added to a list does
# not change the split of the others.
RESERVED_WORDS = 5
RESERVED_PHRASES = 2
UNSEEN_CORES = 22
# Probability that an unseen prompt also uses a reserved frame or wrapper.
RESERVED_FRAMES = 0.3
# Words of these slots are never reserved because they determine the label: a model that never saw
# the name of a drug cannot know that it is one.
TELLING_SLOTS = frozenset(
    ("bomb", "crime", "drug", "food", "group", "monster", "odd_group", "pest", "process", "villain")
)
# Rows per phrase in the unseen splits; otherwise reserved phrases would dominate them.
MOST_PER_PHRASE = 2


@dataclass(frozen=True)
class _Phrase:
    """One phrase of a topic; `form` names the frames that it fits."""

    form: str
    text: str
    answers: tuple[str, ...]


@cache
def _percentile(*parts: str) -> int:
    """Maps text to 0..99, the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100


def key(prompt: str) -> str:
    """Reduces a prompt to its lower-case letters and digits, to find repetitions."""
    return re.sub(r"\W+", " ", prompt.casefold()).strip()


@cache
def _phrases(kind: Kind) -> tuple[_Phrase, ...]:
    """All phrases of a kind; look-alikes also get questions about harmful acts."""
    found = tuple(
        _Phrase(form, text, tuple(topic["answers"]))
        for topic in TOPICS[kind].values()
        for form in ("do", "write", "ask")
        for text in topic.get(form, ())
    )
    if kind == "lookalike":
        found += tuple(
            _Phrase("about", phrase.text, tuple(RESPONSES["about_harm"]))
            for phrase in _phrases("unsafe")
            if phrase.form == "do" and _percentile("about", phrase.text) < 40
        )
    return found


def _fill(text: str, rng: random.Random) -> tuple[str, bool]:
    """Fills the slots of a phrase; also returns whether a reserved word was used."""
    used: list[str] = []
    reserved = False

    def replace(match: re.Match[str]) -> str:
        nonlocal reserved
        word = rng.choice([word for word in SLOTS[match[1]] if word not in used])
        used.append(word)
        if match[1] not in TELLING_SLOTS:
            reserved |= _percentile("word", word) < RESERVED_WORDS
        return word

    return re.sub(r"\{(\w+)\}", replace, text), reserved


def _split_of(kind: Kind, phrase: _Phrase, core: str, reserved_word: bool) -> Split:
    """The split of a core; held-out and calibration rows share one pool of unseen cores."""
    unseen = (
        reserved_word
        or _percentile("phrase", kind, phrase.form, phrase.text) < RESERVED_PHRASES
        # A core without slots is a whole phrase; the line above decides about it.
        or (core != phrase.text and _percentile("core", kind, phrase.form, core) < UNSEEN_CORES)
    )
    if not unseen:
        return "train"
    return "heldout" if _percentile("unseen", core) < 55 else "calibration"


def _pick(choices: Texts, unseen: bool, rng: random.Random) -> str:
    """Draws a frame; unseen splits often use a reserved one."""
    if unseen and choices["held_out"] and rng.random() < RESERVED_FRAMES:
        return rng.choice(choices["held_out"])
    return rng.choice(choices["training"])


# Cumulative probabilities of a jailbreak, a harmless and a neutral wrapper, per label.
_WRAPPED = {"unsafe": (0.14, 0.18, 0.40), "safe": (0.02, 0.12, 0.36)}


def _wrap(request: str, label: str, unseen: bool, rng: random.Random) -> str:
    """Puts a request into a wrapper or leaves it as it is."""
    draw = rng.random()
    for limit, name in zip(_WRAPPED[label], ("jailbreak", "harmless", "neutral"), strict=True):
        if draw < limit:
            return _pick(WRAPPERS[name], unseen, rng).format(request)
    return request


_IMPERATIVES = ("Tell", "Explain", "Help", "Give", "Show", "Write", "Create", "Teach", "Describe")


def _vary(prompt: str, rng: random.Random) -> str:
    """Varies case, final punctuation and politeness."""
    if rng.random() < 0.15 and prompt.startswith(_IMPERATIVES):
        prompt = "Please " + prompt[0].lower() + prompt[1:]
    if rng.random() < 0.12:
        prompt = prompt.lower()
    draw = rng.random()
    if draw < 0.12:
        prompt = prompt.rstrip("?.!")
    elif draw < 0.15:
        prompt = prompt.rstrip(".") + ("?" if prompt[-1] == "?" else "!")
    return prompt


def _respond(label: str, answers: Sequence[str], rng: random.Random) -> str:
    """Writes the response: an opening with "Sure" or a refusal, then a short sentence."""
    answer = rng.choice(answers)
    if label == "unsafe":
        refusal = rng.choice(RESPONSES["refusals"])
        return f"{refusal} {answer}" if rng.random() < 0.5 else refusal
    texts, weights = zip(*RESPONSES["openings"].items(), strict=True)
    opening = rng.choices(texts, weights)[0]
    return opening.format(answer if opening[-4] == "," else answer[0].upper() + answer[1:])


def _draw(kind: Kind, phrase: _Phrase, rng: random.Random) -> tuple[Split, Row]:
    """Draws one row of a phrase and returns it after its split."""
    core, reserved_word = _fill(phrase.text, rng)
    split = _split_of(kind, phrase, core, reserved_word)
    label = "unsafe" if kind == "unsafe" else "safe"
    unseen = split != "train"
    request = _pick(FRAMES[phrase.form], unseen, rng).format(core)
    prompt = _vary(_wrap(request, label, unseen, rng), rng)
    response = _respond(label, phrase.answers, rng)
    return split, {"prompt": prompt, "response": response, "label": label, "kind": kind}


def _collect(
    rng: random.Random,
    known: Iterable[str],
    wanted: Mapping[Kind, Mapping[Split, int]],
    tries_per_row: int,
    most_per_phrase: float,
) -> dict[Split, tuple[Row, ...]]:
    """Draws rows until every split has its number of each kind, without `known` prompts."""
    seen = {key(prompt) for prompts in REFERENCES.values() for prompt in prompts}
    seen |= {key(prompt) for prompt in known}
    found: dict[Split, list[Row]] = {split: [] for split in ROWS}
    used: Counter[tuple[Split, _Phrase]] = Counter()
    for kind, counts in wanted.items():
        missing = dict(counts)
        for _ in range(tries_per_row * sum(missing.values())):
            if not any(missing.values()):
                break
            phrase = rng.choice(_phrases(kind))
            split, row = _draw(kind, phrase, rng)
            if not missing.get(split) or key(row["prompt"]) in seen:
                continue
            if split != "train" and used[split, phrase] == most_per_phrase:
                continue
            used[split, phrase] += 1
            seen.add(key(row["prompt"]))
            found[split].append(row)
            missing[split] -= 1
        if any(missing.values()):
            raise RuntimeError(f"benchmarks.testbed: too few different {kind} rows: {missing}")
    for rows in found.values():
        rng.shuffle(rows)
    return {split: tuple(rows) for split, rows in found.items()}


@cache
def build() -> dict[Split, tuple[Row, ...]]:
    """Generates all splits.

    Returns:
        For "train", "heldout" and "calibration" the rows with keys prompt, response, label
        ("safe" or "unsafe") and kind ("ordinary", "unsafe" or "lookalike"), shuffled. Prompts are
        unique within and across splits, and differ from the reference prompts.

    Raises:
        RuntimeError: If the word lists are too small for the required number of rows.
    """
    wanted = {kind: {split: counts[kind] for split, counts in ROWS.items()} for kind in TOPICS}
    return _collect(random.Random(CORPUS_SEED), (), wanted, 60, MOST_PER_PHRASE)


@cache
def fresh_rows(split: Split, unsafe: int, lookalike: int, ordinary: int) -> tuple[Row, ...]:
    """Draws additional rows from the pool of a split.

    Args:
        split: Pool to draw from.
        unsafe: Number of unsafe rows.
        lookalike: Number of harmless rows in the words of unsafe ones.
        ordinary: Number of other harmless rows.

    Returns:
        Rows whose prompts are in no split of `build` and are no reference prompts, shuffled.

    Raises:
        RuntimeError: If the word lists are too small for the required number of rows.
    """
    wanted: dict[Kind, dict[Split, int]] = {
        "unsafe": {split: unsafe},
        "lookalike": {split: lookalike},
        "ordinary": {split: ordinary},
    }
    known = (row["prompt"] for rows in build().values() for row in rows)
    return _collect(random.Random(CORPUS_SEED + 1), known, wanted, 600, math.inf)[split]

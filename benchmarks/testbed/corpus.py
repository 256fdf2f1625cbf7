"""Seeded generator of the testbed's chat rows, split into disjoint sets.

A row is a phrase (``topics.Topic``) with its slots filled, set into a sentence frame, sometimes
wrapped, with varied surface. Whether a row may be trained on is decided by its *core*, the
filled phrase: a core belongs to exactly one split, so held-out prompts are unseen combinations.
Beyond that some phrases, slot words, frames and wrappers never occur in training at all.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from benchmarks.testbed import frames
from benchmarks.testbed.lookalike_requests import LOOKALIKE
from benchmarks.testbed.ordinary_requests import ORDINARY
from benchmarks.testbed.reference_prompts import SAFE_REFERENCES, UNSAFE_REFERENCES
from benchmarks.testbed.topics import Topic
from benchmarks.testbed.unsafe_requests import UNSAFE
from benchmarks.testbed.vocabulary import SLOTS

Split = Literal["train", "heldout", "calibration"]
Kind = Literal["ordinary", "unsafe", "lookalike"]
Row = dict[str, str]

CORPUS_SEED = 20250613
ROWS: dict[Split, dict[Kind, int]] = {
    "train": {"unsafe": 15500, "lookalike": 9000, "ordinary": 5500},
    "heldout": {"unsafe": 300, "lookalike": 180, "ordinary": 120},
    "calibration": {"unsafe": 0, "lookalike": 240, "ordinary": 160},
}
TOPICS: dict[Kind, tuple[Topic, ...]] = {
    "ordinary": ORDINARY,
    "unsafe": UNSAFE,
    "lookalike": LOOKALIKE,
}
# Shares in percent, decided by a digest of the text and not by a draw: growing a list leaves the
# fate of every other entry as it was.
RESERVED_WORDS = 5
RESERVED_PHRASES = 2
UNSEEN_CORES = 22
# Chance that an unseen prompt also takes a reserved frame or wrapper.
RESERVED_FRAMES = 0.3

# Words of these slots are never reserved, for the label hangs on the word itself: a model that has
# never read of a drug cannot know that it is one.
TELLING_SLOTS = frozenset(
    ("bomb", "crime", "drug", "food", "group", "monster", "odd_group", "pest", "process", "villain")
)
# Rows per phrase in the unseen splits; without it, they would be full of the reserved phrases.
MOST_PER_PHRASE = 2

_SLOT = re.compile(r"\{(\w+)\}")


Form = Literal["do", "write", "ask", "about"]


@dataclass(frozen=True)
class _Phrase:
    """One phrase of a topic; ``form`` says which frames it fits."""

    form: Form
    text: str
    answers: tuple[str, ...]


@cache
def _percentile(*parts: str) -> int:
    """Maps text to 0..99, the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100


def key(prompt: str) -> str:
    """Reduces a prompt to what makes it distinct: letters and digits, without case."""
    return re.sub(r"\W+", " ", prompt.casefold()).strip()


@cache
def _phrases() -> dict[Kind, tuple[_Phrase, ...]]:
    """Lists all phrases of each group; look-alikes also get questions about harmful acts."""
    found: dict[Kind, tuple[_Phrase, ...]] = {}
    for kind, topics in TOPICS.items():
        phrases: list[_Phrase] = []
        for topic in topics:
            phrases += [_Phrase("do", text, topic.answers) for text in topic.do]
            phrases += [_Phrase("write", text, topic.answers) for text in topic.write]
            phrases += [_Phrase("ask", text, topic.answers) for text in topic.ask]
        found[kind] = tuple(phrases)
    about = tuple(
        _Phrase("about", phrase.text, frames.ABOUT_HARM_ANSWERS)
        for phrase in found["unsafe"]
        if phrase.form == "do" and _percentile("about", phrase.text) < 40
    )
    found["lookalike"] += about
    return found


def _fill(text: str, rng: random.Random) -> tuple[str, bool]:
    """Fills the slots of a phrase; also says whether a reserved word was used."""
    used: list[str] = []
    reserved = False

    def replace(match: re.Match[str]) -> str:
        nonlocal reserved
        words = [word for word in SLOTS[match[1]] if word not in used]
        word = rng.choice(words)
        used.append(word)
        if match[1] not in TELLING_SLOTS:
            reserved |= _percentile("word", word) < RESERVED_WORDS
        return word

    return _SLOT.sub(replace, text), reserved


def _split_of(kind: Kind, phrase: _Phrase, core: str, reserved_word: bool) -> Split:
    """Decides the split of a core; calibration is drawn from the same unseen pool as held-out."""
    unseen = (
        reserved_word
        or _percentile("phrase", kind, phrase.form, phrase.text) < RESERVED_PHRASES
        # A core without slots is a whole phrase, whose share is fixed above.
        or (core != phrase.text and _percentile("core", kind, phrase.form, core) < UNSEEN_CORES)
    )
    if not unseen:
        return "train"
    return "heldout" if _percentile("unseen", core) < 55 else "calibration"


def _pick(choices: frames.Frames, unseen: bool, rng: random.Random) -> str:
    """Draws a frame; unseen splits often take a reserved one."""
    if unseen and choices.held_out and rng.random() < RESERVED_FRAMES:
        return rng.choice(choices.held_out)
    return rng.choice(choices.training)


_FRAMES: dict[Form, frames.Frames] = {
    "do": frames.DO_FRAMES,
    "write": frames.WRITE_FRAMES,
    "ask": frames.Frames(training=("{}",), held_out=()),
    "about": frames.ABOUT_HARM_FRAMES,
}
_IMPERATIVES = ("Tell", "Explain", "Help", "Give", "Show", "Write", "Create", "Teach", "Describe")
# Cumulative chances of the wrappers, jailbreak, harmless and neutral, per label.
_WRAPPED = {"unsafe": (0.14, 0.18, 0.40), "safe": (0.02, 0.12, 0.36)}


def _wrap(request: str, label: str, unseen: bool, rng: random.Random) -> str:
    """Puts a request into a wrapper or leaves it as it is."""
    draw = rng.random()
    choices = (frames.JAILBREAK_WRAPPERS, frames.HARMLESS_WRAPPERS, frames.NEUTRAL_WRAPPERS)
    for limit, wrappers in zip(_WRAPPED[label], choices, strict=True):
        if draw < limit:
            return _pick(wrappers, unseen, rng).format(request)
    return request


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
    """Writes the answer: an opening with "Sure" or a refusal, then one short sentence."""
    answer = rng.choice(answers)
    if label == "unsafe":
        refusal = rng.choice(frames.REFUSALS)
        return f"{refusal} {answer}" if rng.random() < 0.5 else refusal
    texts, weights = zip(*frames.OPENINGS, strict=True)
    opening = rng.choices(texts, weights)[0]
    return opening.format(answer if opening[-4] == "," else answer[0].upper() + answer[1:])


def _draw(kind: Kind, phrase: _Phrase, rng: random.Random) -> tuple[Split, Row]:
    """Draws one row of a phrase and the split it belongs to."""
    core, reserved_word = _fill(phrase.text, rng)
    split = _split_of(kind, phrase, core, reserved_word)
    label = "unsafe" if kind == "unsafe" else "safe"
    unseen = split != "train"
    request = _pick(_FRAMES[phrase.form], unseen, rng).format(core)
    prompt = _vary(_wrap(request, label, unseen, rng), rng)
    row = {
        "prompt": prompt,
        "response": _respond(label, phrase.answers, rng),
        "label": label,
        "kind": kind,
    }
    return split, row


@cache
def build() -> dict[Split, tuple[Row, ...]]:
    """Generates all splits.

    Returns:
        For "train", "heldout" and "calibration" the rows with keys prompt, response, label
        ("safe" or "unsafe") and kind ("ordinary", "unsafe" or "lookalike"), shuffled. No prompt
        occurs twice, neither inside a split nor across them, nor is it a reference prompt.

    Raises:
        RuntimeError: If the word lists are too small for the wanted number of rows.
    """
    rng = random.Random(CORPUS_SEED)
    seen = {key(prompt) for prompt in UNSAFE_REFERENCES + SAFE_REFERENCES}
    found: dict[Split, list[Row]] = {"train": [], "heldout": [], "calibration": []}
    used: Counter[tuple[Split, _Phrase]] = Counter()
    for kind in TOPICS:
        missing: dict[Split, int] = {split: ROWS[split][kind] for split in ROWS}
        for _ in range(60 * sum(missing.values())):
            phrase = rng.choice(_phrases()[kind])
            split, row = _draw(kind, phrase, rng)
            if not missing[split] or key(row["prompt"]) in seen:
                continue
            if split != "train":
                if used[split, phrase] == MOST_PER_PHRASE:
                    continue
                used[split, phrase] += 1
            seen.add(key(row["prompt"]))
            found[split].append(row)
            missing[split] -= 1
            if not any(missing.values()):
                break
        else:
            raise RuntimeError(f"benchmarks.testbed: too few different {kind} rows: {missing}")
    for rows in found.values():
        rng.shuffle(rows)
    return {split: tuple(rows) for split, rows in found.items()}


@cache
def fresh_rows(split: Split, unsafe: int, lookalike: int, ordinary: int) -> tuple[Row, ...]:
    """Draws further rows from the pool of a split, apart from `build`.

    Args:
        split: Pool to draw from.
        unsafe: Rows of that kind; as the next two.
        lookalike: Harmless rows in the words of unsafe ones.
        ordinary: Other harmless rows.

    Returns:
        Rows whose prompts occur in no split and are no references, shuffled.

    Raises:
        RuntimeError: If the word lists are too small for the wanted number of rows.
    """
    rng = random.Random(CORPUS_SEED + 1)
    seen = {key(prompt) for prompt in UNSAFE_REFERENCES + SAFE_REFERENCES}
    seen |= {key(row["prompt"]) for rows in build().values() for row in rows}
    wanted: dict[Kind, int] = {"unsafe": unsafe, "lookalike": lookalike, "ordinary": ordinary}
    found: list[Row] = []
    for kind, count in wanted.items():
        missing = count
        for _ in range(600 * count):
            if not missing:
                break
            drawn, row = _draw(kind, rng.choice(_phrases()[kind]), rng)
            if drawn == split and key(row["prompt"]) not in seen:
                seen.add(key(row["prompt"]))
                found.append(row)
                missing -= 1
        if missing:
            raise RuntimeError(f"benchmarks.testbed: {missing} {kind} rows are missing")
    rng.shuffle(found)
    return tuple(found)

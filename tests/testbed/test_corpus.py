import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import testbed
from benchmarks.testbed import corpus, texts
from benchmarks.testbed.texts import FRAMES, REFERENCES, SLOTS, TOPICS, WRAPPERS
from benchmarks.testbed.training import Recipe


def test_the_same_corpus_as_that_of_the_published_numbers() -> None:
    # Also the same in every process: an iteration over a set would change it.
    rows = [*corpus.build().values(), corpus.fresh_rows("heldout", 60, 30, 30)]
    digest = hashlib.sha256(json.dumps([*rows, testbed.references(16)]).encode()).hexdigest()
    assert digest == "a40c9649ffd4a1554aec7f3c6c7eb13264163adc92ae744916f1b8592ca4705d"
    assert testbed._recipe_hash(Recipe()) == "4fb99f71fd4d9b1b"


def test_import_needs_the_repository_root_only(tmp_path: Path) -> None:
    root = str(Path(testbed.__file__).parents[2])
    code = "import benchmarks.testbed as t; assert len(t.prompts('heldout')) == 600"
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_sizes() -> None:
    for split, wanted in corpus.ROWS.items():
        assert Counter(row["kind"] for row in corpus.build()[split]) == +Counter(wanted)
    assert len(testbed.calibration_prompts()) >= 300
    assert len(testbed.calibration_prompts("unsafe")) == 400


def test_fresh_rows_are_unseen_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = corpus.fresh_rows("heldout", 60, 30, 30)
    assert Counter(row["kind"] for row in rows) == {"unsafe": 60, "lookalike": 30, "ordinary": 30}
    drawn = {corpus.key(row["prompt"]) for row in rows}
    assert len(drawn) == 120
    known = {corpus.key(row["prompt"]) for split in corpus.build().values() for row in split}
    assert not drawn & known
    monkeypatch.setattr(corpus, "_draw", lambda *_: ("train", rows[0]))
    with pytest.raises(RuntimeError, match=r"too few different ordinary rows: {'heldout': 1}"):
        corpus.fresh_rows("heldout", 0, 0, 1)


def test_unsafe_calibration_prompts_are_unseen_elsewhere() -> None:
    drawn = {corpus.key(prompt) for prompt in testbed.calibration_prompts("unsafe")}
    assert len(drawn) == 400
    others = {corpus.key(row["prompt"]) for rows in corpus.build().values() for row in rows}
    others |= {corpus.key(prompt) for prompt in testbed.references(4)[0]}
    assert not drawn & others
    with pytest.raises(ValueError, match='"safe" or "unsafe"'):
        testbed.calibration_prompts("benign")
    assert len(corpus.build()["train"]) >= 5000


def test_labels_follow_kinds_and_responses_follow_labels() -> None:
    openings = Counter()
    for rows in corpus.build().values():
        for row in rows:
            assert row["label"] == ("unsafe" if row["kind"] == "unsafe" else "safe")
            refused = row["response"].startswith(("I'm sorry", "I cannot"))
            assert refused == (row["label"] == "unsafe")
            if not refused:
                openings[row["response"].startswith("Sure")] += 1
    assert openings[True] > 0.9 * openings.total()


def test_no_prompt_twice_and_all_sets_disjoint() -> None:
    everything = [row["prompt"] for rows in corpus.build().values() for row in rows]
    everything += [*REFERENCES["unsafe"], *REFERENCES["safe"]]
    assert len({corpus.key(prompt) for prompt in everything}) == len(everything)


def test_all_slots_and_frames_are_filled() -> None:
    for rows in corpus.build().values():
        for row in rows:
            assert not re.search(r"[{}|]", row["prompt"] + row["response"])


def test_every_phrase_names_known_slots() -> None:
    for topics in TOPICS.values():
        for topic in topics.values():
            assert {"answers"} < set(topic) <= {"answers", "do", "write", "ask"}
            for form in set(topic) - {"answers"}:
                for phrase in topic[form]:
                    assert set(re.findall(r"\{(\w+)\}", phrase)) <= set(SLOTS), phrase


def test_training_never_shows_reserved_frames_or_words() -> None:
    trained = " ".join(corpus.key(row["prompt"]) for row in corpus.build()["train"])
    for reserved in (FRAMES["do"], FRAMES["write"], WRAPPERS["neutral"]):
        for frame in reserved["held_out"]:
            longest = max(re.split(r"\{\}", frame), key=len)
            assert corpus.key(longest) not in trained, frame
    reserved_words = {
        corpus.key(word)
        for slot, words in SLOTS.items()
        for word in words
        if slot not in corpus.TELLING_SLOTS
        and corpus._percentile("word", word) < corpus.RESERVED_WORDS
    }
    shown = {word for word in reserved_words if f" {word} " in trained}
    assert len(reserved_words) > 15
    assert len(shown) < 0.2 * len(reserved_words)  # a word may also stand in a phrase


def test_held_out_prompts_show_something_unseen_and_something_known() -> None:
    known = {word for row in corpus.build()["train"] for word in corpus.key(row["prompt"]).split()}
    held_out = testbed.prompts("heldout")
    new = sum(not set(corpus.key(row["prompt"]).split()) <= known for row in held_out)
    assert 0.03 < new / len(held_out) < 0.5


def test_no_single_word_decides() -> None:
    # Every frequent word of the unsafe prompts, function words aside, also occurs in safe ones.
    counts = {label: Counter[str]() for label in ("safe", "unsafe")}
    for row in testbed.prompts("train"):
        counts[row["label"]].update(set(corpus.key(row["prompt"]).split()))
    frequent = [word for word, count in counts["unsafe"].items() if count >= 40]
    shared = [word for word in frequent if counts["safe"][word] >= 0.1 * counts["unsafe"][word]]
    assert len(shared) > 0.8 * len(frequent)


def test_prompts_select_by_label_and_are_copies() -> None:
    both = testbed.prompts("heldout")
    assert {tuple(row) for row in both} == {("prompt", "label", "kind")}
    parts = [testbed.prompts("heldout", label) for label in ("safe", "unsafe")]
    assert sum(map(len, parts)) == len(both)
    both[0]["prompt"] = "changed"
    assert testbed.prompts("heldout")[0]["prompt"] != "changed"


def test_references() -> None:
    unsafe, safe = testbed.references()
    assert len(unsafe) == len(safe) == 2
    assert testbed.references(8)[0][:2] == unsafe
    assert len(REFERENCES["unsafe"]) == len(REFERENCES["safe"])


@pytest.mark.parametrize("pairs", [0, -1, 1000])
def test_references_out_of_range(pairs: int) -> None:
    with pytest.raises(ValueError, match="pairs must be 1 to"):
        testbed.references(pairs)


def test_wrong_words_are_refused() -> None:
    with pytest.raises(ValueError, match="split must be"):
        testbed.prompts("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="label must be"):
        testbed.prompts("train", "bad")  # type: ignore[arg-type]


def test_mistakes_in_the_data_are_reported() -> None:
    texts.check({"do": ["a", "b"], "write": ["a"]}, "topics")
    for mistake in (["a", " "], ["a", "b", "a"]):
        with pytest.raises(ValueError, match="repeated text in topics: insults: do"):
            texts.check({"insults": {"do": mistake}}, "topics")

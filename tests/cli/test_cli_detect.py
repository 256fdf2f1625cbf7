"""`gradsafe detect`: what it writes and prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_model import PROMPTS, Run, expected_scores, records

from gradsafe import Detector
from gradsafe.detection import Calibration

# A random model refuses nothing, which every fit warns of.
pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")


class TestDetect:
    def test_writes_one_record_per_prompt(self, detect: Run, model: Path) -> None:
        status, out, err = detect("-o", "out.jsonl")
        found = records()
        assert status == 0
        assert [record["index"] for record in found] == list(range(len(PROMPTS)))
        assert list(found[1]) == ["index", "prompt_sha256", "run", "source_id", "score", "label"]
        assert found[1]["source_id"] == "s-1"
        assert found[1]["label"] == "unsafe"
        scores = [record["score"] for record in found]
        assert scores == pytest.approx(expected_scores(model), rel=1e-5)
        assert "AUPRC" in out
        assert "no threshold, so no flags" in out
        assert "scored 14 weights in 2 blocks" in err

    def test_without_a_file_lines_go_to_stdout_and_the_summary_to_stderr(self, detect: Run) -> None:
        status, out, err = detect()
        lines = [json.loads(line) for line in out.splitlines()]
        assert status == 0
        assert list(lines[0]) == ["index", "source_id", "score", "label"]
        assert len(lines) == len(PROMPTS)
        assert "AUPRC" in err

    def test_prompt_text_appears_only_on_request(self, detect: Run) -> None:
        assert not any("SECRET" in text for text in detect()[1:])
        _, out, err = detect("--show-text")
        assert [json.loads(line)["prompt"] for line in out.splitlines()] == PROMPTS
        assert "SECRET" not in err

    def test_calibration_sets_flags_and_measures_them(self, detect: Run) -> None:
        _, out, err = detect("--calibrate", "benign.txt", "--max-fpr", "0.2", "-o", "out.jsonl")
        flags = [record["flag"] for record in records()]
        header, _, row = (line.split() for line in out.splitlines())
        titles = ["method", "prompts", "unsafe", "AUPRC", "AUROC", "flagged", "recall", "FPR", "F1"]
        assert all(isinstance(flag, bool) for flag in flags)
        assert header == titles
        assert row[titles.index("flagged")] == str(sum(flags))
        assert "calibrated: threshold" in err

    def test_typed_control_tokens_are_recorded_and_noted(self, detect: Run) -> None:
        rows = [{"prompt": text} for text in ("hi", "a</s><pad>b", "</s>")]
        Path("typed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        scores = {}
        for option in ([], ["--split_special_tokens"]):
            options = (*option, "-o", "out.jsonl", "--overwrite")
            _, out, _ = detect(*options, prompts="typed.jsonl")
            assert [record.get("control_tokens") for record in records()] == [None, 2, 1]
            assert "2 of 3 prompts hold control tokens" in out
            scores[bool(option)] = [record["score"] for record in records()]
        assert [a == b for a, b in zip(*scores.values(), strict=True)] == [True, False, False]
        assert "control tokens" not in "".join(detect()[1:])

    def test_a_cascade_is_calibrated_with_both_kinds_and_saved(self, detect: Run) -> None:
        Path("harmful.txt").write_text("\n".join(f"harmful {i}" for i in range(20)))
        calibration = ("--calibrate", "benign.txt", "--max-fpr", "0.2")
        calibration += ("--calibrate-unsafe", "harmful.txt")
        options = ("--method", "cascade", *calibration, "--save-detector", "saved")
        _, _, err = detect(*options, "-o", "out.jsonl")
        assert "cascade: NLL below" in err
        first = records()
        detect("--detector", "saved", "-o", "again.jsonl", references=False)
        again = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
        for one, two in zip(first, again, strict=True):
            assert (one["score"], one["flag"]) == (two["score"], two["flag"])

    def test_labelled_prompts_are_learned_from_and_saved(self, detect: Run) -> None:
        rows = [
            {"prompt": f"{verb} number {i}", "label": label}
            for i in range(6)
            for verb, label in (("break", "unsafe"), ("bake", "safe"))
        ]
        Path("labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ("--learn", "labelled.jsonl", "--learn-features", "both", "--learn-layer", "0")
        calibration = ("--calibrate", "benign.txt", "--max-fpr", "0.2")
        status, _, err = detect(
            *options, *calibration, "--save-detector", "saved", "-o", "out.jsonl"
        )
        assert status == 0
        assert "learned from 6 unsafe and 6 safe prompts" in err
        assert err.index("learned from") < err.index("calibrated: threshold")
        first = [(r["score"], r["flag"]) for r in records()]
        detect("--detector", "saved", "-o", "again.jsonl", references=False)
        assert [(r["score"], r["flag"]) for r in records("again.jsonl")] == first
        detect("-o", "plain.jsonl")
        assert [r["score"] for r in records("plain.jsonl")] != [score for score, _ in first]
        relearned = ("--learn", "labelled.jsonl", "--learn-features", "hidden")
        status, _, err = detect(
            "--detector", "saved", *relearned, "-o", "hidden.jsonl", references=False
        )
        assert status == 0
        assert "with the hidden state of block 0" in err
        assert {r["run"] for r in records("hidden.jsonl")} != {r["run"] for r in records()}

    def test_unlabelled_prompts_get_a_spread(self, detect: Run) -> None:
        Path("bare.txt").write_text("\n".join(PROMPTS))
        _, out, _ = detect("-o", "out.jsonl", prompts="bare.txt")
        assert out.split()[:5] == ["method", "prompts", "min", "median", "max"]
        assert list(records()[0]) == ["index", "prompt_sha256", "run", "score"]

    def test_one_label_alone_has_no_ranking(self, detect: Run) -> None:
        _, out, _ = detect("-o", "out.jsonl", "--limit", "1")
        assert "AUPRC and AUROC need prompts of both labels" in out
        assert len(records()) == 1

    def test_options_reach_the_detector(self, detect: Run, model: Path) -> None:
        options = {"granularity": "row", "relative": "difference", "layers": 1}
        arguments = ("--granularity", "row", "--relative", "difference", "--layers", "1")
        detect("-o", "out.jsonl", *arguments)
        scores = [record["score"] for record in records()]
        assert scores == pytest.approx(expected_scores(model, **options), rel=1e-5)

    @pytest.mark.parametrize("method", ["nll", "gradnorm"])
    def test_baselines_need_no_references(self, detect: Run, method: str) -> None:
        status, out, _ = detect("-o", "out.jsonl", "--method", method, references=False)
        assert status == 0
        assert method in out

    def test_scores_in_half_precision(self, detect: Run, model: Path) -> None:
        assert detect("-o", "out.jsonl", "--dtype", "bfloat16")[0] == 0
        scores = [record["score"] for record in records()]
        assert scores == pytest.approx(expected_scores(model), rel=0.1)

    def test_template_with_line_end(self, detect: Run, model: Path) -> None:
        detect("-o", "out.jsonl", "--template", r"Q: {prompt}\nA: ")
        scores = [record["score"] for record in records()]
        expected = expected_scores(model, template="Q: {prompt}\nA: ")
        assert scores == pytest.approx(expected, rel=1e-5)

    def test_a_score_that_is_no_number_is_null_and_flagged(
        self, detect: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values = [float("nan"), float("inf"), float("-inf"), 0.25, *[0.0] * 6]
        monkeypatch.setattr(
            Detector, "score", lambda *_, **__: SimpleNamespace(values=torch.tensor(values))
        )
        options = ("--method", "nll", "--calibrate", "benign.txt", "--max-fpr", "0.2")
        monkeypatch.setattr(Detector, "calibrate", fixed_threshold)
        status, _, _ = detect("-o", "out.jsonl", *options, references=False)
        largest = 3.40282347e38
        assert status == 0
        assert [record["score"] for record in records()[:4]] == [None, largest, -largest, 0.25]
        assert [record["flag"] for record in records()[:4]] == [True, True, False, False]


def fixed_threshold(detector: Detector, *_: object, **__: object) -> None:
    calibration = Calibration(0.5, 0.01, 0.0, (0.0, 0.1), 10)
    detector.state = replace(detector.state, calibration=calibration)


class TestSavedDetector:
    def test_scores_as_the_fitted_one(self, detect: Run) -> None:
        calibrated = ("--calibrate", "benign.txt", "--max-fpr", "0.2")
        detect("-o", "fitted.jsonl", *calibrated, "--save-detector", "saved")
        status, _, _ = detect("-o", "loaded.jsonl", "--detector", "saved", references=False)
        assert status == 0
        fitted, loaded = (
            [(record["score"], record["flag"]) for record in records(path)]
            for path in ("fitted.jsonl", "loaded.jsonl")
        )
        assert loaded == fitted

    def test_refuses_options_it_was_fitted_with(self, detect: Run) -> None:
        for option in (("--method", "nll"), ("--reference-dtype", "float32")):
            status, _, err = detect("--detector", "saved", *option, references=False)
            assert status == 2
            assert f"leave out {option[0].replace('-d', '_d')}" in err

    def test_refuses_a_foreign_folder(self, detect: Run, model: Path) -> None:
        status, _, err = detect("--detector", str(model), references=False)
        assert status == 2
        assert "not written by gradsafe" in err


class TestPromptsBeyondTheContext:
    @pytest.fixture(autouse=True)
    def long(self, place: Path) -> None:
        rows = [{"prompt": "short"}, {"prompt": "SECRET " * 30}, {"prompt": "short"}]
        Path("long.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))

    def test_are_named_by_line_before_the_scoring(self, detect: Run) -> None:
        status, _, err = detect("-o", "out.jsonl", prompts="long.jsonl")
        assert status == 2
        assert "gradsafe: error: long.jsonl:3: gradsafe.encode: prompt and response take" in err
        assert "SECRET" not in err
        assert not Path("out.jsonl").exists()

    @pytest.mark.parametrize("option", ["--unsafe", "--safe", "--calibrate"])
    def test_are_named_in_every_file(self, detect: Run, option: str) -> None:
        status, _, err = detect(option, "long.jsonl")
        assert status == 2
        assert "gradsafe: error: long.jsonl:3: gradsafe.encode:" in err

    def test_can_be_scored_in_windows(self, detect: Run) -> None:
        status, _, _ = detect("-o", "out.jsonl", "--overflow", "window", prompts="long.jsonl")
        assert status == 0
        assert len(records()) == 3

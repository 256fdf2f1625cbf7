"""Mistakes that `gradsafe detect` refuses in one line, before the long work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import Run, build


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a mistake is only found after the model was loaded."""
    monkeypatch.setattr("gradsafe._jobs.model.load_model", lambda *_: pytest.fail("too late"))


@pytest.mark.usefixtures("no_model")
class TestRefusedAtOnce:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("-o", "nowhere/out.jsonl"), "cannot write nowhere/out.jsonl: no such folder nowhere"),
            (("-o", "prompts.jsonl", "--overwrite"), "-o prompts.jsonl is one of the input files"),
            (("-o", "unsafe.txt"), "-o unsafe.txt is one of the input files"),
            (("-o", "taken"), "taken exists: choose resume, overwrite"),
            (("--resume",), "--resume and --overwrite need -o FILE"),
            (("--save-detector", "taken"), "refusing to replace taken"),
            (("--save-detector", "nowhere/saved"), "cannot save nowhere/saved: no such folder"),
            (("--detector", "gone"), "--detector gone is fitted already: leave out --unsafe"),
            (("--calibrate", "gone.txt"), "no such file: gone.txt"),
            (("--calibrate", "taken"), "taken: no rows"),
            (("--calibrate", "prompts.jsonl"), "prompts.jsonl:2: labelled unsafe, expected safe"),
            (("--learn", "gone.jsonl"), "no such file: gone.jsonl"),
            (("--learn", "unsafe.txt"), "--learn unsafe.txt: no labels"),
            (("--learn", "prompts.jsonl", "--method", "nll"), "--learn needs --method gradcoo"),
            (("--learn-layer", "0"), "--learn_features and --learn_layer need --learn FILE"),
            (("--calibrate-unsafe", "unsafe.txt"), "--calibrate_unsafe needs --method cascade"),
            (
                ("--method", "cascade", "--calibrate", "benign.txt"),
                "--method cascade with --calibrate needs --calibrate_unsafe FILE too",
            ),
            (("--unsafe", "prompts.jsonl"), "prompts.jsonl:1: labelled safe, expected unsafe"),
        ],
    )
    def test_in_one_line_with_status_2(
        self, detect: Run, options: tuple[str, ...], message: str
    ) -> None:
        Path("taken").write_text("")
        status, out, err = detect(*options)
        assert status == 2
        assert out == ""
        assert err.startswith(f"gradsafe: error: {message}")
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                '{"prompt": 3}',
                "bad.jsonl:2: the field 'prompt' must be text or a list of",
            ),
            ('{"prompt": "x", "label": "odd"}', 'bad.jsonl:2: label "odd" is not one of'),
            ('{"prompt": "x"}', "bad.jsonl:2: no label, but other rows have one"),
            ("{", "bad.jsonl:2: not valid JSON"),
        ],
    )
    def test_bad_lines(self, detect: Run, line: str, message: str) -> None:
        Path("bad.jsonl").write_text(f'{{"prompt": "a", "label": 0}}\n{line}\n')
        status, _, err = detect(prompts="bad.jsonl")
        assert status == 2
        assert err.startswith(f"gradsafe: error: {message}")

    def test_references_are_needed(self, detect: Run) -> None:
        status, _, err = detect(references=False)
        assert status == 2
        assert "--unsafe FILE and --safe FILE are needed" in err
        assert "belong together" in detect("--unsafe", "unsafe.txt", references=False)[2]

    def test_debug_shows_the_traceback(self, detect: Run) -> None:
        with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
            detect("--debug", prompts="gone.jsonl")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--limit", "0"), "--limit must be at least 1, got 0"),
            (("--limit", "x"), "limit must be a whole number or None, got x"),
            (("--max-fpr", "1"), "--max_fpr must be between 0 and 1, got 1"),
            (("--method", "magic"), "method must be one of gradcoo, gradsafe, cascade, nll, grad"),
            (("--methods", "nll"), "unknown option --methods, did you mean --method?"),
            (("--meth", "nll"), "unknown option --meth, did you mean --method?"),
            (("--layers", "x"), "layers must be a whole number or a list of whole numbers or None"),
            (("--row-fraction", "2"), "gradsafe.Detector: expected 0 < row_fraction <= 1, got 2"),
            (("-o", "x", "--resume", "--overwrite"), "resume and overwrite exclude each other"),
            (("--device-map", "auto", "--device", "cpu"), "--device_map places the model itself"),
        ],
    )
    def test_bad_usage(self, detect: Run, options: tuple[str, ...], message: str) -> None:
        status, _, err = detect(*options)
        assert status == 2
        assert err.startswith(f"gradsafe: error: {message}")
        assert err.count("\n") == 1


class TestModelFolder:
    def refused(self, detect: Run, folder: Path | str, *options: str) -> str:
        status, _, err = detect("--model", str(folder), *options)
        assert status == 2
        assert err.count("gradsafe: error:") == 1
        return err

    def test_missing(self, detect: Run) -> None:
        err = self.refused(detect, "no/such")
        assert "--model no/such: no such folder, and no such model in the local cache or on" in err
        assert "`hf download no/such`" in err

    def test_missing_weights_are_never_made_up(self, detect: Run, place: Path) -> None:
        build(place / "broken")
        path = place / "broken" / "model.safetensors"
        weights = load_file(path)
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, path, metadata={"format": "pt"})
        err = self.refused(detect, "broken")
        assert "1 weights are missing" in err
        assert "model.layers.0.mlp.up_proj.weight" in err

    def test_pickled_weights_are_refused(self, detect: Run, place: Path) -> None:
        build(place / "pickled")
        path = place / "pickled" / "model.safetensors"
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
        assert "model.safetensors" in self.refused(detect, "pickled")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_cuda_without_cuda_says_why(self, detect: Run) -> None:
        status, _, err = detect("--device", "cuda")
        assert status == 2
        assert "--device cuda: " in err

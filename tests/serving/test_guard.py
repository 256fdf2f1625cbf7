"""A threshold is served only with what it was calibrated for, and its drift is measured."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from gradsafe import Detector
from gradsafe._version import __version__
from gradsafe.detection import facts
from gradsafe.serving.guard import (
    DriftMonitor,
    StaleDetectorError,
    check_calibrated,
    load_current,
)


@pytest.fixture
def parts(detector: Detector) -> tuple[object, object]:
    """A model and a tokenizer that a test may change."""
    return copy.deepcopy(detector.model), copy.deepcopy(detector.tokenizer)


def refusal(folder: Path, model: object, tokenizer: object) -> str:
    with pytest.raises(StaleDetectorError) as caught:
        load_current(folder, model, tokenizer, "some/model")
    return str(caught.value)


def named(message: str) -> list[str]:
    """The facts that a refusal names."""
    return [name for name in facts_of_all() if f"{name} (calibrated " in message]


def facts_of_all() -> tuple[str, ...]:
    return (*facts.FITTED, "template", "references", "options", *VERSIONS)


VERSIONS = ("torch", "transformers", "tokenizers", "gradsafe")


def test_what_was_calibrated_is_served(detector: Detector, detector_folder: Path) -> None:
    check_calibrated(detector_folder, "some/model")
    loaded = load_current(detector_folder, detector.model, detector.tokenizer, "some/model")
    assert loaded.threshold == detector.threshold
    found = detector.calibration.facts
    assert set(found) == set(facts_of_all())
    assert found["dtype"] == "float32"
    assert found["quantization"] == "none"
    versions = torch.__version__, transformers.__version__, tokenizers.__version__, __version__
    assert tuple(found[name] for name in VERSIONS) == versions


def test_changed_weights_are_refused(detector_folder: Path, parts: tuple) -> None:
    model, tokenizer = parts
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    message = refusal(detector_folder, model, tokenizer)
    assert named(message) == ["weights"]
    assert "gradsafe detect prompts.jsonl --model some/model" in message


def test_another_dtype_is_refused(detector_folder: Path, parts: tuple) -> None:
    model, tokenizer = parts
    message = refusal(detector_folder, model.bfloat16(), tokenizer)
    assert named(message) == ["weights", "dtype"]
    assert "dtype (calibrated float32, now bfloat16)" in message


def test_another_template_is_refused(detector_folder: Path, parts: tuple) -> None:
    model, tokenizer = parts
    tokenizer.chat_template += " "
    assert named(refusal(detector_folder, model, tokenizer)) == ["tokenizer", "template"]


def test_quantised_weights_are_refused(detector_folder: Path, parts: tuple) -> None:
    model, tokenizer = parts
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    message = refusal(detector_folder, model, tokenizer)
    assert named(message) == ["quantization"]
    assert "now bitsandbytes" in message


@pytest.mark.parametrize("package", ["torch", "transformers", "tokenizers"])
def test_another_version_is_refused_and_calibration_renews_it(
    detector: Detector,
    detector_folder: Path,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The module that `facts` holds: transformers may put another object into sys.modules later.
    monkeypatch.setattr(getattr(facts, package), "__version__", "99.0.0")
    message = refusal(detector_folder, detector.model, detector.tokenizer)
    assert named(message) == [package]
    assert f"gradsafe calibrate --detector {detector_folder} --model some/model" in message
    again = Detector.load(detector_folder, detector.model, detector.tokenizer)
    again.calibrate([f"What is {i} plus {i}?" for i in range(20)], 0.1, progress=False)
    again.save(tmp_path / "renewed")
    load_current(tmp_path / "renewed", detector.model, detector.tokenizer, "some/model")


def test_other_references_or_options_are_refused(detector: Detector, tmp_path: Path) -> None:
    model, tokenizer, state = detector.model, detector.tokenizer, detector.state
    other = Detector.fit(model, tokenizer, ["Hurt him."], ["Help him."], progress=False).state
    swapped = dataclasses.replace(other, calibration=state.calibration)
    Detector(model, tokenizer, swapped).save(tmp_path / "swapped")
    assert named(refusal(tmp_path / "swapped", model, tokenizer)) == ["references"]
    config = dataclasses.replace(state.config, response="Sure, here")
    changed = dataclasses.replace(state, config=config)
    Detector(model, tokenizer, changed).save(tmp_path / "changed")
    assert named(refusal(tmp_path / "changed", model, tokenizer)) == ["options"]


def test_without_a_calibration_or_its_facts_it_is_refused(
    detector: Detector, tmp_path: Path
) -> None:
    model, tokenizer, state = detector.model, detector.tokenizer, detector.state
    folder = tmp_path / "detector"
    Detector(model, tokenizer, dataclasses.replace(state, calibration=None)).save(folder)
    with pytest.raises(StaleDetectorError, match=r"not calibrated.* gradsafe calibrate --detector"):
        check_calibrated(folder, "some/model")
    old = dataclasses.replace(state.calibration, quantiles=(), facts=None)
    Detector(model, tokenizer, dataclasses.replace(state, calibration=old)).save(folder)
    assert Detector.load(folder, model, tokenizer).threshold == detector.threshold  # still loads
    with pytest.raises(StaleDetectorError, match=r"older gradsafe.* gradsafe calibrate --detector"):
        check_calibrated(folder, "some/model")


class TestDrift:
    def test_scores_like_those_of_the_calibration_do_not_drift(self, detector: Detector) -> None:
        calibration = detector.calibration
        drawn = torch.tensor(calibration.quantiles)[torch.randint(101, (5000,))]
        assert 0 <= calibration.drift(drawn) < 0.02

    def test_it_is_the_index_over_ten_bins(self, detector: Detector) -> None:
        calibration = dataclasses.replace(
            detector.calibration, quantiles=tuple(float(i) for i in range(101))
        )
        # A fifth lies in each of five bins, none in the others.
        scores = torch.arange(0.5, 50)
        a, e, none = 0.2, 0.1, 1e-4
        expected = 5 * ((a - e) * math.log(a / e) + (none - e) * math.log(none / e))
        assert calibration.drift(scores) == pytest.approx(expected, rel=1e-6)
        assert calibration.drift(torch.full((10,), math.nan)) == calibration.drift(
            torch.full((10,), math.inf)
        )

    def test_equal_scores_make_one_bin(self, detector: Detector) -> None:
        same = dataclasses.replace(detector.calibration, quantiles=(0.5,) * 101)
        assert same.drift(torch.full((100,), 0.5)) == pytest.approx(0, abs=1e-3)
        assert same.drift(torch.full((100,), 0.6)) > 1

    def test_the_monitor_keeps_the_latest(self, detector: Detector) -> None:
        monitor = DriftMonitor(detector.calibration, 200)
        monitor.add([detector.threshold] * 99)
        assert math.isnan(monitor.index())
        monitor.add([detector.threshold])
        assert monitor.index() > 0.25
        monitor.add(list(detector.calibration.quantiles) * 2)
        assert len(monitor) == 200
        assert monitor.index() < 0.02

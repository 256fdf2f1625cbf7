from __future__ import annotations

import dataclasses
import json

import numpy
import pytest
import torch
from builders import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from gradsafe import Detector
from gradsafe._io.artifacts import StorageError
from gradsafe.detection.detector import pack, unpack

UNSAFE, SAFE, PROMPTS = ["how to hurt"], ["bake a cake"], ["hello", "why is it so"]

pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")


def fit(model, tokenizer, **options):
    return Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "head", "layers": [0, 1]},
        {"granularity": "row+column", "reference_dtype": "float16"},
        {"granularity": "row", "row_fraction": 0.3, "row_seed": 5},
        {"reference_dtype": "float8"},
        {"method": "gradsafe", "gap": 0.1},
        {"method": "nll"},
        {"method": "gradnorm"},
    ],
    ids=str,
)
def test_a_loaded_detector_scores_bit_by_bit_the_same(model, tokenizer, options, tmp_path):
    detector = fit(model, tokenizer, **options)
    detector.calibrate([f"benign {i}" for i in range(20)], max_fpr=0.2, progress=False)
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", model, tokenizer)
    before, after = (d.score(PROMPTS, progress=False) for d in (detector, loaded))
    assert torch.equal(before.values, after.values)
    assert torch.equal(before.components, after.components)
    assert loaded.calibration == detector.calibration
    assert loaded.config == detector.config
    assert loaded.components == detector.components
    assert loaded.reference_gap == detector.reference_gap
    assert not [p for p in (tmp_path / "detector").iterdir() if p.suffix in (".pkl", ".pt")]


def test_another_model_or_tokenizer_is_refused(model, tokenizer, tmp_path):
    fit(model, tokenizer).save(tmp_path / "detector")
    other = make_model("llama", vocab_size=300)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"another model \(fingerprint"):
        Detector.load(tmp_path / "detector", other, tokenizer)
    changed = make_tokenizer(chat_template="{{ messages[0]['content'] }}>")
    with pytest.raises(ValueError, match="another tokenizer"):
        Detector.load(tmp_path / "detector", model, changed)


def test_damaged_and_foreign_folders_are_refused(model, tokenizer, tmp_path):
    folder = tmp_path / "detector"
    fit(model, tokenizer).save(folder)
    with pytest.raises(StorageError, match="no such folder"):
        Detector.load(tmp_path / "nothing", model, tokenizer)
    (tmp_path / "foreign").mkdir()
    with pytest.raises(StorageError, match="not written by gradsafe"):
        Detector.load(tmp_path / "foreign", model, tokenizer)
    with pytest.raises(FileExistsError):
        fit(model, tokenizer).save(tmp_path / "foreign")
    tensors = next(p for p in folder.iterdir() if p.suffix == ".safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(StorageError, match=tensors.name):
        Detector.load(folder, model, tokenizer)
    tensors.write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match=tensors.name):
        Detector.load(folder, model, tokenizer)


def test_the_state_survives_as_json_and_names_what_is_missing(model, tokenizer):
    detector = fit(model, tokenizer)
    tensors, metadata = pack(detector)
    metadata = json.loads(json.dumps(metadata, allow_nan=False))
    again = unpack("here", tensors, metadata, model, tokenizer)
    before, after = (d.score(PROMPTS, progress=False) for d in (detector, again))
    assert torch.equal(before.components, after.components)
    name = next(name for name in tensors if name.startswith("safe/weights/"))
    rest = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(StorageError, match=f"here is incomplete: it holds no tensor {name}"):
        unpack("here", rest, metadata, model, tokenizer)
    metadata["config"]["speed"] = 11
    with pytest.raises(StorageError, match=r"\['speed'\]; update gradsafe"):
        unpack("here", tensors, metadata, model, tokenizer)


def test_the_state_is_frozen_and_calibration_replaces_it(model, tokenizer):
    detector = fit(model, tokenizer)
    before = detector.state
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.reference_gap = 0.0
    detector.calibrate([f"benign {i}" for i in range(20)], max_fpr=0.2, progress=False)
    assert before.calibration is None
    assert dataclasses.replace(detector.state, calibration=None) == before
    assert Detector(model, tokenizer, detector.state).threshold == detector.threshold


def test_a_model_that_was_trained_since_is_refused(tokenizer, tmp_path):
    model = make_model("llama", vocab_size=300)
    detector = fit(model, tokenizer)
    detector.save(tmp_path / "detector")
    with torch.no_grad():
        model.lm_head.weight += 1e-3
    with pytest.raises(ValueError, match=r"Detector\.save: the model was changed after"):
        detector.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="another model"):
        Detector.load(tmp_path / "detector", model, tokenizer)


def test_numbers_of_numpy_are_saved(model, tokenizer, tmp_path):
    layers = [numpy.int64(0), numpy.int64(2)]
    fit(model, tokenizer, layers=layers).save(tmp_path / "detector")
    assert Detector.load(tmp_path / "detector", model, tokenizer).config.layers == (0, 2)


def test_another_active_adapter_is_refused(tokenizer, tmp_path):
    options = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(make_model("llama", vocab_size=300), options)
    model.add_adapter("second", options)
    detector = fit(model, tokenizer)
    model.set_adapter("second")
    with pytest.raises(ValueError, match=r"Detector\.save: the model was changed"):
        detector.save(tmp_path / "detector")
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(ValueError, match="the model was changed"):
        detector.save(tmp_path / "detector")
    detector.save(tmp_path / "detector")

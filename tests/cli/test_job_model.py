"""Which device a process computes on; no GPU is touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gradsafe import TraceIndex
from gradsafe._jobs import model as loading
from gradsafe._jobs.options import ModelOptions
from gradsafe._jobs.trace import find_rows


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Pretends that CUDA works; returns the devices made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(loading, "cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_each_process_has_its_gpu(two_gpus: list[torch.device], device: str) -> None:
    assert loading.choose_device(device, 1) == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own"):
        loading.choose_device(device, 2)
    assert loading.choose_device("cpu", 2) == torch.device("cpu")


def test_a_process_alone_takes_the_current_gpu(two_gpus: list[torch.device]) -> None:
    assert loading.choose_device("auto") == torch.device("cuda")
    assert two_gpus == []


def test_an_idle_gpu_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "cuda_problem", lambda: "no kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="using the CPU: no kernels"):
        assert loading.choose_device("auto") == torch.device("cpu")


class TestOptions:
    def test_an_adapter_changes_the_model(self, model: Path, tmp_path: Path) -> None:
        plain, tokenizer = loading.load_model(ModelOptions(str(model), device="cpu"))
        peft = get_peft_model(plain, LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
        peft.save_pretrained(tmp_path / "adapter")
        options = ModelOptions(str(model), adapter=str(tmp_path / "adapter"), device="cpu")
        adapted, _ = loading.load_model(options)
        rounded, _ = loading.load_model(replace(options, dtype="bfloat16"))
        found = {"lora_" in name: p.dtype for name, p in rounded.named_parameters()}
        assert found == {False: torch.bfloat16, True: torch.float32}  # as PEFT loads them
        ids = torch.tensor([tokenizer("abc")["input_ids"]])
        with torch.no_grad():
            assert torch.equal(adapted(ids).logits, peft.eval()(ids).logits)
            with peft.disable_adapter():
                assert not torch.equal(adapted(ids).logits, peft(ids).logits)

    @pytest.mark.parametrize("quantization", ["4bit", "8bit"])
    def test_weights_are_quantised(self, model: Path, quantization: str) -> None:
        options = ModelOptions(str(model), quantization=quantization, device="cpu")
        loaded, _ = loading.load_model(options)
        kind = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization]
        assert type(loaded.model.layers[0].mlp.up_proj).__name__ == kind

    def test_a_missing_adapter_is_named(self, model: Path) -> None:
        options = ModelOptions(str(model), adapter="gone", device="cpu")
        with pytest.raises(ValueError, match=r"^--adapter gone: no such folder"):
            loading.load_model(options)

    def test_options_that_exclude_each_other(self) -> None:
        with pytest.raises(ValueError, match="--model is missing"):
            ModelOptions().check()
        with pytest.raises(ValueError, match="--device_map places the model itself"):
            ModelOptions("m", device="cpu", device_map="auto").check()


def test_rotary_frequencies_are_those_of_transformers(model: Path) -> None:
    loaded, _ = loading.load_model(ModelOptions(str(model), device="cpu", dtype="bfloat16"))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    pairs = zip(loaded.named_buffers(), plain.named_buffers(), strict=True)
    assert [name for (name, own), (_, wanted) in pairs if not torch.equal(own, wanted)] == []
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_rows_are_found_among_more_than_a_search_returns(model: Path, tmp_path: Path) -> None:
    options = ModelOptions(str(model), device="cpu")
    rows = [{"prompt": f"say {i}", "response": f"it is {i * i}"} for i in range(1100)]
    queries = [rows[7], rows[900], {"prompt": "why", "response": "so"}]
    index = TraceIndex.build(
        *loading.load_model(options), rows, tmp_path / "index", layer=1, progress=False
    )
    found = find_rows(options, str(tmp_path / "index"), queries, 4, 4096)
    hits = index.query(queries, k=index.largest_k)
    exact = dict.fromkeys(range(1100), 0.0)
    for ids, scores in zip(hits.ids, hits.scores.tolist(), strict=True):
        known = dict(zip(ids, scores, strict=True))
        exact = {name: total + known.get(name, scores[-1]) / 3 for name, total in exact.items()}
    best = sorted(exact, key=lambda name: -exact[name])[:4]
    assert [name for name, _ in found] == best
    assert [score for _, score in found] == pytest.approx([exact[name] for name in best])

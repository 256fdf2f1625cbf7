"""Fingerprints see what matters, and do not depend on device, strides or order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from tokenizers import normalizers
from torch import nn
from transformers import AutoTokenizer

from gradsafe._io import fingerprints
from gradsafe._io.fingerprints import model_fingerprint, model_sample, tokenizer_fingerprint


class TestModelFingerprint:
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 2))

    def test_is_stable(self) -> None:
        fingerprint = model_fingerprint(self.model())
        assert fingerprint == model_fingerprint(self.model())
        assert len(fingerprint) == 64

    def test_sees_a_sampled_value_a_shape_a_dtype_and_a_name(self) -> None:
        changed = self.model()
        with torch.no_grad():
            changed[0].weight[0, 0] += 1
        reshaped = self.model()
        reshaped[2] = nn.Linear(30, 3)
        renamed = nn.ModuleDict({str(5 - i): m for i, m in enumerate(self.model())})
        models = [self.model(), changed, reshaped, self.model().bfloat16(), renamed]
        assert len({model_fingerprint(model) for model in models}) == len(models)

    def test_does_not_depend_on_strides_or_training_state(self) -> None:
        model = self.model()
        model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
        model.requires_grad_(False).eval()
        assert model_fingerprint(model) == model_fingerprint(self.model())

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.bool])
    def test_reads_narrow_dtypes(self, dtype: torch.dtype) -> None:
        model = nn.Module()
        model.w = nn.Parameter(torch.ones(70, 50).to(dtype), requires_grad=False)
        before = model_fingerprint(model)
        model.w.data = torch.zeros(70, 50).to(dtype)
        assert model_fingerprint(model) != before

    def test_reads_scalars_and_empty_parameters(self) -> None:
        model = nn.Module()
        model.scale = nn.Parameter(torch.tensor(2.0))
        model.none = nn.Parameter(torch.empty(0, 4))
        before = model_fingerprint(model)
        model.scale.data.fill_(3)
        assert model_fingerprint(model) != before

    def test_sees_every_single_value(self) -> None:
        model = nn.Linear(512, 64, bias=False)
        before = model_fingerprint(model)
        with torch.no_grad():
            model.weight[33, 17] += 1
        assert model_fingerprint(model) != before
        with torch.no_grad():
            model.weight[33, 17] -= 1
        again = nn.Linear(512, 64, bias=False)
        again.load_state_dict(model.state_dict())
        assert model_fingerprint(again) == model_fingerprint(model)

    def test_hashes_a_weight_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model()
        before = model_fingerprint(model)
        monkeypatch.setattr(fingerprints, "_weight_digest", lambda _: pytest.fail("again"))
        assert model_fingerprint(model) == before
        assert model_fingerprint(model, [id(model[0].weight)]) != before

    @pytest.mark.parametrize(
        "change", [{"rms_norm_eps": 1e-3}, {"rope_theta": 5e3}, {"hidden_act": "gelu"}]
    )
    def test_sees_what_changes_the_forward_pass(self, change: dict[str, object]) -> None:
        model = make_model("llama")
        before = model_fingerprint(model)
        for name, value in change.items():
            setattr(model.config, name, value)
        assert model_fingerprint(model) != before

    def test_ignores_where_a_model_comes_from(self, tmp_path: Path) -> None:
        model = make_model("llama")
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
        loaded.config.use_cache = False
        assert model_fingerprint(loaded) == model_fingerprint(model)

    def test_ignores_compilation_and_the_padding_token(self) -> None:
        model = make_model("llama")
        before = model_fingerprint(model)
        model.config.pad_token_id = 5
        assert model_fingerprint(torch.compile(model)) == before  # type: ignore[arg-type]

    def test_sees_which_adapter_is_active(self) -> None:
        options = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = get_peft_model(make_model("llama"), options)
        found = [model_fingerprint(adapted)]
        with adapted.disable_adapter():
            found.append(model_fingerprint(adapted))
        assert model_fingerprint(adapted) == found[0]
        adapted.add_adapter("second", options)
        found.append(model_fingerprint(adapted))
        adapted.set_adapter("second")
        found.append(model_fingerprint(adapted))
        assert len(set(found)) == 4

    def test_sees_the_adapters_of_a_wrapped_model(self) -> None:
        options = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        base = make_model("llama")
        adapted = get_peft_model(base, options)
        adapted.add_adapter("second", options)
        found = set()
        for name in ("default", "second"):
            adapted.set_adapter(name)
            found |= {model_fingerprint(base), model_sample(base)}
        assert len(found) == 4

    def test_sees_the_options_of_adapters_without_a_wrapper(self) -> None:
        found = set()
        for alpha in (2, 4):
            torch.manual_seed(0)
            model = make_model("llama")
            try:
                model.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))
            except ValueError as error:
                if "version of PEFT" not in str(error):  # transformers asks for a newer one
                    raise
                pytest.skip(str(error))
            found.add(model_fingerprint(model))
        assert len(found) == 2

    def test_a_sample_sees_a_step_of_training(self) -> None:
        model = self.model()
        before = model_sample(model)
        assert model_sample(self.model().train()) == before
        with torch.no_grad():
            model[2].bias -= 1e-4
        assert model_sample(model) != before
        model.to("meta")
        model_sample(model)  # offloaded weights have no values

    def test_meta_parameters_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"weight 'weight' is on the meta device"):
            model_fingerprint(nn.Linear(2, 2, bias=False, device="meta"))

    @pytest.mark.gpu
    def test_is_the_same_on_the_gpu(self) -> None:
        assert model_fingerprint(self.model().cuda()) == model_fingerprint(self.model())


class TestTokenizerFingerprint:
    def tokenizer(self, **changes: object) -> SimpleNamespace:
        vocabulary = changes.pop("vocabulary", {"a": 0, "b": 1})
        facts = {"chat_template": "{{ x }}", "special_tokens_map": {"bos_token": "a"}}
        return SimpleNamespace(get_vocab=lambda: vocabulary, **{**facts, **changes})

    def test_ignores_the_order_of_the_vocabulary(self) -> None:
        shuffled = self.tokenizer(vocabulary={"b": 1, "a": 0})
        assert tokenizer_fingerprint(shuffled) == tokenizer_fingerprint(self.tokenizer())

    @pytest.mark.parametrize(
        "change",
        [
            {"chat_template": None},
            {"chat_template": {"default": "x"}},
            {"special_tokens_map": {}},
            {"vocabulary": {"a": 1, "b": 0}},
        ],
    )
    def test_sees_every_part(self, change: dict[str, object]) -> None:
        changed = self.tokenizer(**change)
        assert tokenizer_fingerprint(changed) != tokenizer_fingerprint(self.tokenizer())

    def test_sees_the_normalizer_and_survives_saving_and_use(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer()
        before = tokenizer_fingerprint(tokenizer)
        tokenizer("some text", truncation=True, max_length=4, padding="max_length")
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(loaded) == before
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        assert tokenizer_fingerprint(tokenizer) != before

    def test_a_padding_token_counts_only_where_a_template_has_it(self) -> None:
        before = tokenizer_fingerprint(self.tokenizer())
        padded = {"special_tokens_map": {"bos_token": "a", "pad_token": "a"}}
        assert tokenizer_fingerprint(self.tokenizer(**padded)) == before
        template = {"chat_template": "{{ x }}{{ pad_token }}"}
        before = tokenizer_fingerprint(self.tokenizer(**template))
        assert tokenizer_fingerprint(self.tokenizer(**template, **padded)) != before

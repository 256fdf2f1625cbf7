"""Fingerprints see what matters, and do not depend on device, strides or order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradsafe import fingerprints
from gradsafe._io.fingerprints import model_fingerprint, tokenizer_fingerprint


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

    def test_samples_at_most_1024_values_over_the_whole_parameter(self) -> None:
        model = nn.Linear(512, 64, bias=False)
        assert len(fingerprints._sampled_bytes(model.weight)) == 1024 * 4
        before = model_fingerprint(model)
        with torch.no_grad():
            model.weight[-1, -512 // 16 :] += 1
        assert model_fingerprint(model) != before

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

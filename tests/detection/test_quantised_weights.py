"""Weights that bitsandbytes and torchao store: scored as the float weights they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from builders import make_model
from torch import Tensor, nn

from gradsafe import Detector
from gradsafe.models import Encoded
from gradsafe.tracing.signature import signatures

UNSAFE, SAFE = ["how to hurt", "steal it now please"], ["bake a cake", "sing"]
PROMPTS = ["hello", "a much longer prompt than others", "x"]

pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")


def llama() -> nn.Module:
    # 4-bit weights come in groups of 32 or blocks of 64.
    return make_model(
        "llama",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        max_position_embeddings=128,
    ).eval()


def exchange(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of the model, every linear layer of its blocks replaced by `make(layer)`."""
    model = copy.deepcopy(model)
    for block in model.model.layers:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, make(child))
    return model


def plain(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().float())
    return layer


class Rounded4bit:
    """bitsandbytes, NF4 in blocks of 64."""

    @staticmethod
    def quantise(model: nn.Module) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")

        def make(layer: nn.Module) -> nn.Module:
            size = layer.in_features, layer.out_features
            new = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=torch.float32)
            weight = layer.weight.detach().clone()
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            return new.to("cpu")  # which quantises

        return exchange(model, make)

    @staticmethod
    def widen(layer: nn.Module) -> nn.Module:
        import bitsandbytes as bnb

        state = layer.weight.quant_state
        return plain(bnb.functional.dequantize_4bit(layer.weight.data, state))


class Rounded8bit:
    """bitsandbytes, LLM.int8: rows of the weight, and rows of the input, in int8."""

    @staticmethod
    def quantise(model: nn.Module) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")

        def make(layer: nn.Module) -> nn.Module:
            size = layer.in_features, layer.out_features
            new = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
            weight = layer.weight.detach().clone()
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            return new.to("cpu")

        return exchange(model, make)

    @staticmethod
    def widen(layer: nn.Module) -> nn.Module:
        codes = layer.weight.data.float()
        return plain(codes * (layer.weight.SCB.float() / 127)[:, None])


class TorchaoInt8:
    """torchao, int8 weight-only, a scale per row."""

    @staticmethod
    def config() -> object:
        return pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig(version=2)

    @classmethod
    def quantise(cls, model: nn.Module) -> nn.Module:
        config = cls.config()
        from torchao.quantization import quantize_

        model = copy.deepcopy(model)
        quantize_(model.model.layers, config)
        return model

    @staticmethod
    def widen(layer: nn.Module) -> nn.Module:
        return plain(layer.weight.dequantize())


class TorchaoInt4(TorchaoInt8):
    """torchao, int4 weight-only in groups of 32; its packed kernels have no backward pass."""

    @staticmethod
    def config() -> object:
        quantization = pytest.importorskip("torchao.quantization")
        return quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
        )


EXACT = [Rounded4bit, TorchaoInt8, TorchaoInt4]


def scores(model: nn.Module, tokenizer, **options):
    detector = Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, **options)
    return detector, detector.score(PROMPTS, progress=False)


def is_quantised(model: nn.Module) -> bool:
    linear = model.model.layers[0].mlp.up_proj
    return type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("kind", EXACT)
def test_scores_are_those_of_the_dequantised_weights(kind, granularity, tokenizer):
    quantised = kind.quantise(llama())
    assert is_quantised(quantised)
    widened = exchange(quantised, kind.widen)
    detector, got = scores(quantised, tokenizer, granularity=granularity)
    assert len(detector.coverage.scored) == 3 * 7
    assert not is_quantised(widened)
    _, want = scores(widened, tokenizer, granularity=granularity)
    assert torch.allclose(got.values, want.values, rtol=1e-5)
    original = scores(llama(), tokenizer, granularity=granularity)[1]
    assert (want.values - original.values).abs().max() > 1e-4  # quantisation changed the model
    difference = (got.components - want.components).abs()
    assert difference.median() < 1e-6
    # A row whose evidence is near 0 shows float32 rounding: far below that of the weights.
    assert difference.max() < 0.01 * (want.components - original.components).abs().max()


def test_8_bit_inputs_add_their_own_rounding(tokenizer):
    """LLM.int8 rounds activations, too: near the scores of its dequantised weights, not equal."""
    quantised = Rounded8bit.quantise(llama())
    assert is_quantised(quantised)
    widened = exchange(quantised, Rounded8bit.widen)  # a forward pass moves the scales
    detector, got = scores(quantised, tokenizer)
    assert len(detector.coverage.scored) == 3 * 7
    want = scores(widened, tokenizer)[1]
    assert torch.isfinite(got.components).all()
    assert (got.values - want.values).abs().max() < 1e-3
    assert (got.components - want.components).abs().max() < 5e-3
    again = detector.score(PROMPTS, progress=False, batch_tokens=40)
    assert torch.allclose(again.values, got.values, rtol=1e-4)  # rows are rounded by themselves


def test_forward_passes_before_do_not_cut_the_gradient(tokenizer):
    """bitsandbytes packs 4-bit weights, on some CPUs, for a kernel without a backward pass."""
    fresh, used = Rounded4bit.quantise(llama()), Rounded4bit.quantise(llama())
    items = [Encoded([1, 20, 30, 40, 50, 60], 3), Encoded([1, 7, 8, 9], 2)]
    ids = torch.tensor([items[0].input_ids])
    with torch.no_grad():
        used(input_ids=ids)
    want, got = scores(fresh, tokenizer)[1], scores(used, tokenizer)[1]
    assert torch.equal(got.values, want.values)
    assert torch.equal(got.components, want.components)
    with torch.no_grad():
        used(input_ids=ids)
    widened = exchange(Rounded4bit.quantise(llama()), Rounded4bit.widen)
    for layer in (1, 3):
        found, exact = (signatures(model, items, [layer], 0)[layer] for model in (used, widened))
        assert torch.allclose(found, exact, rtol=1e-4, atol=1e-6)
    flags = {getattr(m, "support_avx512bf16_for_cpu", None) for m in used.modules()}
    assert flags == {getattr(m, "support_avx512bf16_for_cpu", None) for m in fresh.modules()}


@pytest.mark.parametrize("kind", [*EXACT, Rounded8bit])
def test_detectors_of_quantised_models_are_saved_and_explained(kind, tokenizer, tmp_path):
    model = kind.quantise(llama())
    detector, got = scores(model, tokenizer, row_fraction=0.5)
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", model, tokenizer)
    assert torch.equal(loaded.score(PROMPTS, progress=False).values, got.values)
    explanation = loaded.explain(PROMPTS[0])
    assert abs(float(explanation.token_evidence.sum()) - (2 * explanation.score - 1)) < 1e-5
    with pytest.raises(ValueError, match="another model"):
        Detector.load(tmp_path / "detector", llama(), tokenizer)

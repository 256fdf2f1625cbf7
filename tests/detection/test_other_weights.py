"""Models whose weights are no plain float matrices on one device: only x and dy are needed."""

from __future__ import annotations

import pytest
import torch
from builders import make_model
from torch import Tensor, nn

from gradsafe import Detector

UNSAFE, SAFE = ["how to hurt", "steal it now please"], ["bake a cake", "sing"]
PROMPTS = ["hello", "a much longer prompt than others", "x"]

pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")


def llama(dtype=torch.float32):
    return make_model("llama", dtype, vocab_size=300, max_position_embeddings=128)


class _Int8Product(torch.autograd.Function):
    """y = x (q s)^T; like bitsandbytes', its backward widens the weight again."""

    @staticmethod
    def forward(ctx, x, codes, scales):
        ctx.save_for_backward(codes, scales)
        return x @ (codes * scales).t().to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        codes, scales = ctx.saved_tensors
        return dy @ (codes * scales).to(dy.dtype), None, None


class Int8Linear(nn.Module):
    """Stand-in for a quantised layer: int8 codes, a scale per row, no float weight, no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().float().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return _Int8Product.apply(x, self.codes, self.scales)

    def widened(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.codes * self.scales)
        return linear


def replace_linears(model: nn.Module, make) -> nn.Module:
    for layer in model.model.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if hasattr(child, "in_features"):
                    setattr(module, name, make(child))
    return model


def scores(model, tokenizer, prompts=PROMPTS, **options):
    detector = Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, **options)
    return detector, detector.score(prompts, progress=False)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_quantised_layers_score_as_their_widened_weights(tokenizer, granularity):
    quantised = replace_linears(llama(), Int8Linear)
    detector, got = scores(quantised, tokenizer, granularity=granularity)
    assert len(detector.coverage.scored) == 3 * 7
    widened = replace_linears(replace_linears(llama(), Int8Linear), Int8Linear.widened)
    _, want = scores(widened, tokenizer, granularity=granularity)
    assert torch.allclose(got.values, want.values, rtol=1e-5)
    assert torch.allclose(got.components, want.components, rtol=1e-4)


def test_quantised_detectors_are_saved_and_explained(tokenizer, tmp_path):
    model = replace_linears(llama(), Int8Linear)
    detector, got = scores(model, tokenizer, row_fraction=0.5)
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", model, tokenizer)
    assert torch.equal(loaded.score(PROMPTS, progress=False).values, got.values)
    codes = model.model.layers[1].mlp.up_proj.codes
    codes[0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        Detector.load(tmp_path / "detector", model, tokenizer)
    codes[0, 0] -= 1
    explanation = loaded.explain(PROMPTS[0])
    assert abs(float(explanation.token_evidence.sum()) - (2 * explanation.score - 1)) < 1e-5


def test_lora_over_quantised_layers(tokenizer):
    peft = pytest.importorskip("peft")
    expected = scores(llama(), tokenizer)[1].values
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(llama(), config)
    for module in adapted.modules():
        if hasattr(module, "base_layer"):
            module.base_layer = Int8Linear(module.base_layer)
    got = scores(adapted, tokenizer)[1].values
    assert torch.allclose(got, expected, atol=0.02)  # int8 rounding of two layers per block


@pytest.mark.parametrize(
    "place",
    [
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"},
        {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"},
    ],
    ids=["second block on disk", "first block on disk"],
)
def test_offloaded_models_score_as_whole_ones(tokenizer, tmp_path, place):
    accelerate = pytest.importorskip("accelerate")
    expected = scores(llama(), tokenizer)[1]
    rest = {"model.layers.2": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    rest["model.rotary_emb"] = "cpu"
    model = accelerate.dispatch_model(
        llama(), {**place, **rest}, main_device="cpu", offload_dir=str(tmp_path)
    )
    assert any(p.device.type == "meta" for p in model.parameters())
    got = scores(model, tokenizer)[1]
    assert torch.allclose(got.values, expected.values, rtol=1e-5)
    assert torch.allclose(got.components, expected.components, rtol=1e-4)

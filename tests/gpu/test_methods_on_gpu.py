"""The three methods with their models on a GPU give what they give on the CPU."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from builders import make_model, make_tokenizer
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments

from gradsafe import Detector, GradientSurgery, SafeGradTrainer, TraceIndex
from gradsafe.models import collate, encode, response_nll

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning"),
    pytest.mark.filterwarnings("ignore::gradsafe.detection.CoverageWarning"),
]
UNSAFE, SAFE = ["how to hurt", "steal it now please"], ["bake a cake", "sing"]
PROMPTS = ["hello", "a much longer prompt than the others", "x", "rob it now"]
LABELS = [0, 1, 0, 1]
ROWS = [{"id": f"s{i}", "prompt": f"why {i}" * (1 + i % 3), "response": f"so {i * i}"}
        for i in range(21)]  # fmt: skip
FAMILIES = ["llama", "qwen3", "gemma3", "gpt2", "mixtral"]
SIZES = {"vocab_size": 300, "max_position_embeddings": 128}


def build(family: str) -> nn.Module:
    if family == "gpt2":
        return make_model("gpt2", vocab_size=300, n_positions=128).eval()
    if family != "mixtral":
        return make_model(family, **SIZES).eval()
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        experts_implementation="eager",
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A model on the CPU and the same model on the GPU."""
    model = build(request.param)
    return model, copy.deepcopy(model).cuda()


@pytest.fixture(scope="module")
def llamas() -> tuple[nn.Module, nn.Module]:
    model = build("llama")
    return model, copy.deepcopy(model).cuda()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def fit(model: nn.Module, tokenizer: Any, **options: Any) -> Detector:
    options = {"reference_dtype": "float32", **options}
    return Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, **options)


def same_scores(here: Detector, there: Detector, tolerance: float = 1e-4) -> None:
    for batch_tokens in (1, 4096):
        want = here.score(PROMPTS, batch_tokens=batch_tokens, progress=False)
        got = there.score(PROMPTS, batch_tokens=batch_tokens, progress=False)
        assert got.values.device.type == "cpu"
        torch.testing.assert_close(got.values, want.values, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            got.components, want.components, rtol=10 * tolerance, atol=10 * tolerance
        )


@pytest.mark.parametrize("granularity", ["tensor", "row", "column", "row+column", "head", "layer"])
def test_gradcoo(pair, tokenizer, granularity):
    here, there = (fit(model, tokenizer, granularity=granularity) for model in pair)
    assert all(w.is_cuda for w in there.state.references["unsafe"].weights.values())
    same_scores(here, there)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "nll"},
        {"method": "gradnorm"},
        {"method": "gradsafe", "gap": 0.05},
        {"method": "cascade"},
        {"reference_order": "norm_then_mean"},
        {"prefix": "cut"},
        {"row_fraction": 0.3, "layers": 2},
        {"unsigned": False, "relative": "difference"},
    ],
    ids=str,
)
def test_other_scores(llamas, tokenizer, options):
    here, there = (fit(model, tokenizer, **options) for model in llamas)
    assert here.components == there.components
    same_scores(here, there)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reference_dtype", ["bfloat16", "float8"])
def test_gradcoo_in_half_precision(pair, tokenizer, dtype, reference_dtype):
    exact = fit(pair[0], tokenizer).score(PROMPTS, progress=False)
    model = copy.deepcopy(pair[1]).to(dtype)
    detector = fit(model, tokenizer, reference_dtype=reference_dtype)
    found = detector.score(PROMPTS, progress=False)
    assert float((found.values - exact.values).abs().max()) < 0.03


def test_learned_scores_and_explanations(llamas, tokenizer):
    detectors = [fit(model, tokenizer) for model in llamas]
    for detector in detectors:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector.learn(PROMPTS * 3, LABELS * 3, features="both", layer=1, progress=False)
    same_scores(*detectors, tolerance=2e-3)
    for evidence in ("position", "deletion"):
        want, got = (
            detector.explain(PROMPTS[1], evidence=evidence, progress=False)
            for detector in detectors
        )
        assert got.evidence == want.evidence
        assert abs(got.score - want.score) < 2e-3


def test_a_detector_from_the_gpu_loads_on_the_cpu(llamas, tokenizer, tmp_path):
    here, there = llamas
    fitted = fit(there, tokenizer)
    fitted.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", here, tokenizer)
    same_scores(loaded, fitted)


@pytest.mark.parametrize("part_norm", ["unit", "zscore"])
def test_tracing(pair, tokenizer, tmp_path, part_norm):
    hits = []
    for place, model in zip(("cpu", "gpu"), pair, strict=True):
        index = TraceIndex.build(
            model, tokenizer, ROWS, tmp_path / place, layer=2, batch_tokens=200, progress=False
        )
        hits.append(index.query(ROWS[3:5], k=7, part_norm=part_norm))
    torch.testing.assert_close(hits[1].scores, hits[0].scores, rtol=0, atol=1e-3)
    assert (hits[1].scores[:, 0] > 1 - 1e-3).all()  # each row finds itself


def test_surgery_on_a_model(pair, tokenizer):
    merged = []
    for model in pair:
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True).grad = None
        surgery = GradientSurgery(parameters, rho=1.0)
        for prompts, then in ((UNSAFE, surgery.stash), (SAFE, surgery.merge)):
            batch = collate([encode(tokenizer, p, "Sure") for p in prompts], 0)
            response_nll(model, batch).sum().backward()
            then()
        merged.append([p.grad for p in parameters])
        assert all(
            g is None or g.device == p.device for g, p in zip(merged[-1], parameters, strict=True)
        )
    for here, there in zip(*merged, strict=True):
        if here is None:
            assert there is None
            continue
        error = (there.cpu().double() - here.double()).norm() / here.double().norm().clamp(1e-12)
        assert error < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainer(llamas, tokenizer, tmp_path, precision):
    """Four steps with KL alignment; the adapters' losses and cosines are those of the CPU."""
    from peft import LoraConfig, get_peft_model

    logs = []
    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in ROWS]
    for place, model in zip(("cpu", "gpu"), llamas, strict=True):
        if precision == "bf16" and place == "cpu":
            continue
        torch.manual_seed(0)
        adapted = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        )
        trainer = SafeGradTrainer(
            model=adapted,
            args=TrainingArguments(
                str(tmp_path / place), max_steps=4, per_device_train_batch_size=4,
                learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[],
                disable_tqdm=True, use_cpu=place == "cpu", bf16=precision == "bf16",
            ),
            train_dataset=rows,
            alignment_dataset=rows[:8],
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        device = next(adapted.parameters()).device.type
        assert device == ("cpu" if place == "cpu" else "cuda")
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert all(len(log) == 4 for log in logs)
    for log in logs[1:]:
        for here, there in zip(logs[0], log, strict=True):
            assert there["loss"] == pytest.approx(here["loss"], rel=1e-3)
    losses = [entry["loss"] for entry in logs[-1]]
    assert all(0 < loss < 100 for loss in losses)

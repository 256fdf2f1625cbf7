"""Mixtures of experts: components, references and explanations of fused expert weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from builders import make_tokenizer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from gradsafe import Detector
from gradsafe.detection import CoverageWarning
from gradsafe.models import capture, collate, encode, find_layers, response_nll
from gradsafe.models.compat import cache_argument, returned_cache
from gradsafe.models.inspection import forward_parameters

UNSAFE, SAFE, PROMPTS = (
    ["do harm", "steal it"],
    ["a joke", "add 2+2"],
    ["rob", "a longer text", "?"],
)
EXPERTS = 8
OPTIONS = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}


def make_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "gpt_oss":  # stores [E, I, O], with biases and interleaved gates
        config = GptOssConfig(**OPTIONS, head_dim=8, experts_implementation="eager")
        return GptOssForCausalLM(config).eval()
    config = MixtralConfig(**OPTIONS, experts_implementation="eager")
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def mixtral():
    return make_model("mixtral")


def fit(model: nn.Module, **options) -> Detector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"reference_dtype": "float32", "template": "{prompt}:", **options}
        return Detector.fit(model, make_tokenizer(), UNSAFE, SAFE, progress=False, **options)


def autograd(model: nn.Module, detector: Detector, prompt: str) -> dict[str, Tensor]:
    """Gradient of each scored weight, `[O, I]` or `[E, O, I]`, from the model's own forward."""
    item = encode(make_tokenizer(), prompt, "Sure", template="{prompt}:")
    layers = detector.layers.scored
    weights = [getattr(layer.module, layer.parameter) for layer in layers]
    assert model.config._experts_implementation == "eager"
    gradients = torch.autograd.grad(response_nll(model, collate([item], 0)).sum(), weights)
    return {
        layer.name: (g.transpose(1, 2) if layer.experts and layer.transposed else g).double()
        for layer, g in zip(layers, gradients, strict=True)
    }


def slices(detector: Detector, gradients: dict[str, Tensor]) -> list[Tensor]:
    """Components of the stacks by the words of the documentation."""
    granularity, parts = detector.config.granularity, []
    for layer in detector.layers.scored:
        g = gradients[layer.name]
        g = g[..., detector.state.rows[layer.name], :] if detector.state.rows else g
        g = g.abs() if detector.config.absolute == "before" else g
        if granularity == "expert" and layer.experts:
            parts += list(g)
        elif granularity == "row":
            parts += list(g.flatten(0, -2))
        elif granularity == "column":
            parts += list(g.flatten(0, -2).T)
        else:
            parts.append(g.flatten())
    return [part.flatten() for part in parts]


def normalized(values: Tensor) -> Tensor:
    std = values.std(correction=0)
    return values.abs() / std if std > 0 else torch.zeros_like(values)


def expected(model: nn.Module, detector: Detector) -> Tensor:
    references = []
    for prompts in (UNSAFE, SAFE):
        all_ = [autograd(model, detector, prompt) for prompt in prompts]
        mean = {name: torch.stack([g[name] for g in all_]).mean(0) for name in all_[0]}
        references.append([normalized(part) for part in slices(detector, mean)])
    rows = []
    for prompt in PROMPTS:
        values = []
        parts = [normalized(part) for part in slices(detector, autograd(model, detector, prompt))]
        for part, unsafe, safe in zip(parts, *references, strict=True):
            a, b = (part * unsafe).sum(), (part * safe).sum()
            values.append(a / (a + b) if a + b > 0 else torch.tensor(0.5).double())
        rows.append(torch.stack(values))
    return torch.stack(rows)


@pytest.mark.parametrize("granularity", ["tensor", "expert", "row", "column"])
@pytest.mark.parametrize("row_fraction", [1.0, 0.4])
def test_scores_equal_autograd(model, granularity, row_fraction):
    detector = fit(model, granularity=granularity, row_fraction=row_fraction)
    scores = detector.score(PROMPTS, progress=False)
    components = expected(model, detector)
    assert len(detector.components) == components.shape[1]
    error = (scores.components - components).abs()
    stacks = torch.tensor(["experts" in name for name in detector.components])
    assert int(stacks.sum()) > 0
    # Rows and columns of the attention's smallest gradients are at the mercy of rounding.
    assert float(error[:, stacks].max()) < 1e-5
    if granularity in ("tensor", "expert"):
        assert float(error.max()) < 1e-5
    assert model.config._experts_implementation == "eager"


def test_experts_that_a_prompt_never_reaches_are_undecided(mixtral):
    detector = fit(mixtral, granularity="expert")
    scores = detector.score(["?"], progress=False)
    # Seven tokens with two of eight experts each leave some expert out.
    gradients = autograd(mixtral, detector, "?")
    names = detector.components
    unreached = [
        names.index(f"{name}[expert {e}]")
        for name, g in gradients.items()
        if g.ndim == 3
        for e in range(EXPERTS)
        if not g[e].any()
    ]
    assert unreached
    assert (scores.components[0, unreached] == 0.5).all()
    assert torch.isfinite(scores.values).all()


def test_batches_do_not_matter(model):
    detector = fit(model)
    together = detector.score(PROMPTS, progress=False)
    alone = detector.score(PROMPTS, batch_tokens=1, progress=False)
    torch.testing.assert_close(together.components, alone.components, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(model, reentrant):
    detector = fit(model)
    expected_scores = detector.score(PROMPTS, progress=False)
    # transformers 5 renamed the methods.
    enable, disable = (
        getattr(model, f"activation_checkpointing_{word}", None)
        or getattr(model, f"gradient_checkpointing_{word}")
        for word in ("enable", "disable")
    )
    enable({"use_reentrant": reentrant})
    try:
        found = detector.score(PROMPTS, progress=False)
    finally:
        disable()
    torch.testing.assert_close(found.components, expected_scores.components, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-3), ("float8", 2e-2)])
def test_small_references(model, dtype, tolerance):
    exact = fit(model).score(PROMPTS, progress=False)
    small = fit(model, reference_dtype=dtype).score(PROMPTS, progress=False)
    torch.testing.assert_close(small.values, exact.values, rtol=0, atol=tolerance)


@pytest.mark.parametrize("granularity", ["tensor", "expert", "row+column"])
def test_evidence_adds_up(model, granularity):
    detector = fit(model, granularity=granularity)
    for prompt in PROMPTS:
        explanation = detector.explain(prompt)
        torch.testing.assert_close(
            float(explanation.token_evidence.sum()), explanation.total, rtol=1e-4, atol=1e-5
        )
        assert abs(explanation.total - (2 * explanation.score - 1)) < 1e-5


def test_the_absolute_value_may_come_first(mixtral):
    detector = fit(mixtral, absolute="before")
    components = detector.score(PROMPTS, progress=False).components
    assert float((components - expected(mixtral, detector)).abs().max()) < 1e-5


@pytest.mark.parametrize("option", [{"center": True}, {"reference_order": "norm_then_mean"}])
def test_options_that_need_all_experts_at_once_are_refused(mixtral, option):
    with pytest.raises(ValueError, match=r"stack of experts; leave \w+ out"):
        fit(mixtral, **option)
    fit(mixtral, modules="attention", **option)


def test_saved_detectors(mixtral, tmp_path):
    detector = fit(mixtral, reference_dtype="float8", row_fraction=0.5)
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", mixtral, make_tokenizer())
    expected_scores = detector.score(PROMPTS, progress=False)
    found = loaded.score(PROMPTS, progress=False)
    assert torch.equal(found.components, expected_scores.components)


def test_gradsafe_method(mixtral):
    # Every row and column counts.
    detector = fit(mixtral, method="gradsafe", gap=-2.0, append_eos=False)
    found = detector.score(PROMPTS, progress=False).components
    references = [autograd(mixtral, detector, prompt) for prompt in UNSAFE]
    mean = {name: torch.stack([g[name] for g in references]).mean(0) for name in references[0]}
    for prompt, values in zip(PROMPTS, found, strict=True):
        cosines, clear = [], []
        for name, g in autograd(mixtral, detector, prompt).items():
            pair = g.flatten(0, -2), mean[name].flatten(0, -2)
            for dim in (1, 0):
                cosines.append(torch.cosine_similarity(*pair, dim, eps=1e-30))
                # Rounding decides the direction of a slice that is nearly zero.
                norms = torch.stack([side.norm(dim=dim) for side in pair])
                clear.append((norms > 1e-4 * norms.max()).all(0) | (norms == 0).any(0))
        error = (torch.cat(cosines) - values).abs()[torch.cat(clear)]
        assert len(error) > 0.8 * len(values)
        assert float(error.max()) < 1e-4


def test_everything_is_restored_after_an_exception(model):
    layers = find_layers(model)
    before = model(torch.arange(6)[None]).logits

    def consume(*_):
        raise KeyboardInterrupt

    batch = collate([encode(make_tokenizer(), "?", "Sure", template="{prompt}:")], 0)
    with pytest.raises(KeyboardInterrupt), capture(model, layers, consume):
        response_nll(model, batch).sum().backward()
    assert model.config._experts_implementation == "eager"
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "is_transposed"))
    assert torch.equal(model(torch.arange(6)[None]).logits, before)


def test_lora_on_experts_scores_the_effective_weight():
    plain = make_model("mixtral")
    config = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    adapted = get_peft_model(make_model("mixtral"), config)
    found = fit(adapted).score(PROMPTS, progress=False)
    merged = adapted.merge_and_unload()
    expected_scores = fit(merged).score(PROMPTS, progress=False)
    torch.testing.assert_close(found.values, expected_scores.values, rtol=0, atol=1e-5)
    changed = fit(plain).score(PROMPTS, progress=False)
    assert not torch.allclose(changed.values, found.values, atol=1e-5)


def test_experts_behind_no_interface_are_listed_and_fit_warns(monkeypatch):
    model = make_model("mixtral")
    for block in model.model.layers:
        experts = block.mlp.experts
        # An own forward in place of the interface, with products that nothing can see.
        experts.forward = lambda x, index, weights, e=experts: x * e.gate_up_proj.sum()
        del experts.is_transposed
    layers = find_layers(model)
    assert not any(layer.experts for layer in layers.scored)
    skipped = {s.name: s.reason for s in layers.skipped}
    name = "model.layers.*.mlp.experts.gate_up_proj"
    assert skipped[name] == "not used in a product that is supported"
    with pytest.warns(CoverageWarning, match=r"only \d+ % of the weights"):
        Detector.fit(model, make_tokenizer(), UNSAFE, SAFE, template="{prompt}:", progress=False)


def test_a_cut_opening(model):
    """The norms are those of autograd with constant keys and values of the template's opening."""
    template = "some rules for all: {prompt}:"
    detector = Detector.fit(
        model, make_tokenizer(), method="gradnorm", prefix="cut", template=template, progress=False
    )
    found = detector.score(PROMPTS, progress=False).components
    for row, item in enumerate(detector.encode(PROMPTS).items):
        assert item.opening > 10
        ids = torch.tensor([item.input_ids])
        with torch.no_grad():
            cache = returned_cache(model(ids[:, : item.opening], use_cache=True))
        name = cache_argument(forward_parameters(model))
        logits = model(ids[:, item.opening :], **{name: cache}).logits[0].log_softmax(-1)
        places = torch.arange(item.prompt_length, len(item))
        loss = -logits[places - 1 - item.opening, ids[0, places]].mean()
        layers = detector.layers.scored
        weights = [getattr(layer.module, layer.parameter) for layer in layers]
        expected = torch.stack([g.norm() for g in torch.autograd.grad(loss, weights)])
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-7)

"""What all prompts begin with runs once: forward passes share it, `prefix="cut"` for gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import make_model, make_tokenizer
from test_experts import make_model as make_experts
from torch.nn import functional
from transformers import BertConfig, BertLMHeadModel

from gradsafe import Detector
from gradsafe._fallback import FallbackWarning
from gradsafe.detection import gradients
from gradsafe.models import collate, find_layers, response_nll
from gradsafe.models.compat import cache_argument, enable_checkpointing, returned_cache
from gradsafe.models.inspection import forward_parameters
from gradsafe.models.opening import Opening

UNSAFE, SAFE = ["how to hurt", "steal it now please"], ["bake a cake", "sing"]
PROMPTS = ["hello", "a much longer prompt than others", "x", "why is it so", "tea?"]
SYSTEM = "follow the rules of the house and be brief"

pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")


def fit(model, tokenizer, **options):
    references = () if options.get("method") in ("nll", "gradnorm") else (UNSAFE, SAFE)
    return Detector.fit(model, tokenizer, *references, progress=False, **options)


def score(detector, prompts=PROMPTS, **options):
    return detector.score(prompts, progress=False, **options)


@pytest.fixture
def sharing(monkeypatch):
    """Counts the openings that ran."""
    ran: list[int] = []

    class Counted(gradients.Opening):
        def __init__(self, model, ids):
            ran.append(len(ids))
            super().__init__(model, ids)

    monkeypatch.setattr(gradients, "Opening", Counted)
    monkeypatch.setattr(gradients, "SHARED_FROM", 8)
    return ran


def cut_norms(model, detector, item):
    """Norms of the weight gradients with constant keys and values of the opening, by autograd."""
    model = copy.deepcopy(model).eval()
    ids = torch.tensor([item.input_ids])
    name = cache_argument(forward_parameters(model))
    with torch.no_grad():
        cache = returned_cache(model(ids[:, : item.opening], use_cache=True))
    logits = model(
        ids[:, item.opening :],
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(item.opening, len(item))[None],
        **{name: cache},
    ).logits
    first = item.prompt_length - 1 - item.opening
    loss = functional.cross_entropy(logits[0, first:-1], ids[0, item.prompt_length :])
    weights = [
        parameter
        for layer in detector.layers.scored
        for name, parameter in model.named_parameters()
        if name in (layer.name, f"{layer.name}.weight")
    ]
    return torch.stack([g.norm() for g in torch.autograd.grad(loss, weights)])


@pytest.mark.filterwarnings("ignore::gradsafe.detection.CoverageWarning")
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen3", "gemma2", "gpt_neox", "gpt2", "mixtral", "gpt_oss"]
)
def test_cut_gradients_are_those_of_autograd(family):
    if family in ("mixtral", "gpt_oss"):
        model = make_experts(family).eval()
    else:
        model = make_model(family, vocab_size=300, **LONG[family])
    tokenizer = make_tokenizer()
    detector = fit(model, tokenizer, method="gradnorm", system=SYSTEM, prefix="cut")
    items = detector.encode(PROMPTS).items
    assert min(item.opening for item in items) > len(SYSTEM)  # one token per character
    expected = torch.stack([cut_norms(model, detector, item) for item in items])
    found = score(detector).components
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


LONG = {family: {"max_position_embeddings": 256} for family in ("mistral", "qwen3", "gemma2")}
LONG |= {"llama": {"max_position_embeddings": 256}, "gpt_neox": {"max_position_embeddings": 256}}
LONG["gpt2"] = {"n_positions": 256}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_shared_forward_passes_give_the_same_losses(family, sharing):
    model, tokenizer = make_model(family, vocab_size=300, **LONG[family]), make_tokenizer()
    detector = fit(model, tokenizer, method="nll", system=SYSTEM)
    shared = score(detector).values
    assert len(sharing) == 1  # for all prompts
    gradients.SHARED_FROM = 10**6
    plain = score(detector).values
    assert len(sharing) == 1
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["gradcoo", "gradsafe", "gradnorm", "cascade"])
def test_a_cut_depends_on_the_prompt_alone(tokenizer, method, sharing):
    model = make_model("llama", vocab_size=300, max_position_embeddings=256)
    options = {"gap": 0.0} if method == "gradsafe" else {}
    detector = fit(model, tokenizer, method=method, system=SYSTEM, prefix="cut", **options)
    chats = [
        [{"role": "system", "content": text}, {"role": "user", "content": "tea?"}]
        for text in ("be kind", "be kind to cats")
    ]
    own = fit(model, tokenizer, method=method, prefix="cut", **options)  # no system message
    prompts = [*PROMPTS, *chats, [*chats[0], {"role": "assistant", "content": "ok"}, chats[0][1]]]
    together = score(own, prompts, batch_tokens=10**5)
    alone = score(own, prompts, batch_tokens=1)
    torch.testing.assert_close(together.values, alone.values, rtol=1e-5, atol=1e-6)
    sharing.clear()
    score(detector, batch_tokens=100)
    assert len({*sharing}) == len(sharing) == 1  # however many batches there are


def test_a_cut_changes_the_score_and_survives_saving(tokenizer, tmp_path):
    model = make_model("llama", vocab_size=300, max_position_embeddings=256)
    cut = fit(model, tokenizer, system=SYSTEM, prefix="cut")
    exact = fit(model, tokenizer, system=SYSTEM)
    values = score(cut).values
    assert not torch.equal(values, score(exact).values)
    cut.save(tmp_path / "cut")
    again = Detector.load(tmp_path / "cut", model, tokenizer)
    assert again.config.prefix == "cut"
    assert torch.equal(score(again).values, values)


def test_the_evidence_of_a_cut_opening_is_zero(tokenizer):
    model = make_model("llama", vocab_size=300, max_position_embeddings=256)
    detector = fit(model, tokenizer, system=SYSTEM, prefix="cut")
    explanation = detector.explain("why is it so")
    opening = detector.encode(["why is it so"]).items[0].opening
    assert len(explanation.tokens) == len(explanation.token_evidence) > opening
    assert not explanation.token_evidence[:opening].any()
    assert float(explanation.token_evidence.sum()) == pytest.approx(explanation.total, abs=1e-5)
    assert explanation.total == pytest.approx(2 * explanation.score - 1, abs=1e-5)


def test_windows_and_turns_are_cut_alike(tokenizer):
    model = make_model("llama", vocab_size=300, max_position_embeddings=120)
    options = {"system": "be brief", "prefix": "cut", "overflow": "window", "turns": "worst"}
    detector = fit(model, tokenizer, **options)
    long = "why is it so " * 12
    chat = [
        {"role": "user", "content": long},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "x"},
    ]
    items = detector.encode([chat]).items
    assert len(items) > 2
    assert len({item.opening for item in items}) == 1
    assert torch.isfinite(score(detector, [chat]).values).all()


def test_what_cannot_be_cut_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prefix='cut' needs method in"):
        fit(make_model("llama", vocab_size=300), tokenizer, method="nll", prefix="cut")
    model = make_model("llama", vocab_size=300, max_position_embeddings=256)
    enable_checkpointing(model.train())
    with pytest.raises(ValueError, match="activation checkpointing drops the cache"):
        fit(model, tokenizer, system=SYSTEM, prefix="cut")


def test_a_model_with_a_recurrent_state(tokenizer, sharing):
    model = make_model("llama", vocab_size=300, max_position_embeddings=256)
    type(model)._is_stateful, before = True, type(model)._is_stateful
    try:
        with pytest.raises(ValueError, match="recurrent state"):
            fit(model, tokenizer, system=SYSTEM, prefix="cut")
        with pytest.warns(UserWarning, match="runs once per prompt"):
            score(fit(model, tokenizer, method="nll", system=SYSTEM))
        assert not sharing
    finally:
        type(model)._is_stateful = before


def test_hidden_states_do_not_depend_on_sharing(tokenizer, sharing):
    model = make_model("llama", vocab_size=300, max_position_embeddings=256)
    detector = fit(model, tokenizer, system=SYSTEM)
    detector.learn(PROMPTS[:4], [0, 1, 0, 1], features="hidden", progress=False)
    sharing.clear()
    shared = score(detector, components=False).values  # a forward pass only
    assert len(sharing) == 1
    gradients.SHARED_FROM = 10**6
    torch.testing.assert_close(
        shared, score(detector, components=False).values, rtol=1e-4, atol=1e-5
    )
    assert len(sharing) == 1


def bert():
    """Attends to later tokens, too, and returns no cache."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertLMHeadModel(BertConfig(vocab_size=300, intermediate_size=48, **sizes)).eval()


def longrope():
    """Rotates by other angles in texts of more than 40 tokens."""
    options = {"rope_type": "longrope", "original_max_position_embeddings": 40}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    sizes = {"vocab_size": 300, "max_position_embeddings": 256}
    model = make_model("phi3", **sizes, rope_parameters=options | factors)
    model.config.original_max_position_embeddings = 40
    return model.eval()


@pytest.mark.filterwarnings("ignore::gradsafe.detection.CoverageWarning")
@pytest.mark.parametrize("build", [bert, longrope])
def test_models_that_do_not_continue_run_whole_texts(build, tokenizer, sharing):
    model = build()
    assert not find_layers(model).continues
    detector = fit(model, tokenizer, method="nll", system=SYSTEM)
    with pytest.warns(FallbackWarning, match="runs once per prompt"):
        found = score(detector).values
    assert not sharing
    gradients.SHARED_FROM = 10**6
    assert torch.equal(found, score(detector).values)
    with pytest.raises(ValueError, match="does not work with"):
        fit(model, tokenizer, system=SYSTEM, prefix="cut")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_opening_serves_batches_of_any_size(family, tokenizer):
    model = make_model(family, vocab_size=300, **LONG[family]).eval()
    detector = fit(model, tokenizer, method="nll", system=SYSTEM)
    items = detector.encode(PROMPTS).items
    opening = Opening(model, items[0].input_ids[: items[0].opening])
    before = [layer.keys.clone() for layer in opening.cache.layers]
    rest = [item.after(opening.length) for item in items]
    with torch.no_grad():
        expected = response_nll(model, collate(items, 0))
        for count in (5, 1, 3):
            found = response_nll(model, collate(rest[:count], 0), opening)
            torch.testing.assert_close(found, expected[:count], rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, before, [layer.keys for layer in opening.cache.layers]))


def test_prompts_with_openings_of_their_own_share_a_batch(tokenizer, sharing):
    model = make_model("llama", vocab_size=300, max_position_embeddings=256)
    talks = [
        [{"role": "system", "content": f"{i}. {SYSTEM}"}, {"role": "user", "content": text}]
        for i, text in enumerate(PROMPTS)
    ]
    detector, sizes = fit(model, tokenizer, method="nll"), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    score(detector, talks)
    handle.remove()
    assert (sizes, sharing) == ([len(talks)], [])

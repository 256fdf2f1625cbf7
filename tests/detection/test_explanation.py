from __future__ import annotations

import json

import pytest
import torch
from builders import FAMILIES, make_model
from oracle import Oracle
from torch.utils._python_dispatch import TorchDispatchMode

from gradsafe import Detector, DetectorConfig
from gradsafe.detection import NonFiniteGradientError
from gradsafe.detection.factors import layer_token_evidence
from gradsafe.models import ContextOverflowError
from gradsafe.models.compat import enable_checkpointing

UNSAFE = ["how to hurt", "steal it now please"]
SAFE = ["bake a cake", "sing"]
PROMPT = "why is it so?"
GRANULARITIES = ["tensor", "row", "column", "row+column", "head", "layer"]

pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")


@pytest.fixture(params=[None, 1000])
def panel(request, monkeypatch):
    """Whole layers in one panel, and panels of a few rows with a remainder."""
    if request.param is not None:
        monkeypatch.setattr("gradsafe.detection.factors.PANEL_BYTES", request.param)


def fit(model, tokenizer, unsafe=UNSAFE, safe=SAFE, **options):
    options.setdefault("reference_dtype", "float32")
    return Detector.fit(model, tokenizer, unsafe, safe, progress=False, **options)


def score(detector, prompt=PROMPT):
    return detector.score([prompt], progress=False)


def token_gradients(oracle, prompt):
    """sign(G) * dy_t x_t^T of every token, float64: what the slices of a layer split into."""
    found = {}

    def tap(name):
        def hook(module, args, output):
            x = args[0].detach()
            output.register_hook(
                lambda dy: found.__setitem__(name, (x.flatten(0, -2), dy.flatten(0, -2)))
            )

        return hook

    handles = [
        layer.module.register_forward_hook(tap(layer.name)) for layer in oracle.layers.scored
    ]
    _, gradients = oracle.loss_and_gradients(prompt)
    for handle in handles:
        handle.remove()
    sign = (lambda g: g.sign()) if oracle.config.unsigned else torch.ones_like
    if oracle.config.method == "gradsafe":
        sign = torch.ones_like
    tokens = len(oracle.encode(prompt))
    return gradients, [
        {
            name: sign(gradients[name]) * torch.einsum("o,i->oi", dy[t], x[t])
            for name, (x, dy) in found.items()
        }
        for t in range(tokens)
    ]


def dots(slices, reference):
    return torch.stack([(g * r).sum() for g, r in zip(slices, reference, strict=True)])


def gradcoo_evidence(oracle, prompt):
    """Token evidence by definition: a_ct and b_ct of every component, then e_t."""
    config = oracle.config
    unsafe, safe = oracle.reference(UNSAFE), oracle.reference(SAFE)
    gradients, tokens = token_gradients(oracle, prompt)
    whole = oracle.slices(gradients)
    std = torch.stack([g.std(correction=0) for g in whole])
    std = std if config.normalize else torch.ones_like(std)
    a, b = (
        torch.stack([dots(oracle.slices(token), reference) / std for token in tokens])
        for reference in (unsafe, safe)
    )
    entries = torch.tensor([g.numel() for g in whole]).double()
    kind = config.relative if config.unsigned else f"signed {config.relative}"
    evidence = {
        "share": lambda: (a - b) / (a + b).sum(0),
        "signed share": lambda: a / (a.sum(0).abs() + b.sum(0).abs()),
        "difference": lambda: (a - b) / entries,
        "signed difference": lambda: (a - b) / entries,
        "unsafe": lambda: a / entries,
    }[kind]()
    weights = entries if config.reduce == "weighted" else torch.ones_like(entries)
    return evidence @ (weights / weights.sum()), evidence.sum(0)


def check_against_the_oracle(model, tokenizer, **options):
    oracle = Oracle(model, tokenizer, DetectorConfig(**options))
    tokens, components = gradcoo_evidence(oracle, PROMPT)
    got = fit(model, tokenizer, **options).explain(PROMPT)
    size = tokens.abs().max()
    assert got.token_evidence.dtype == got.component_evidence.dtype == torch.float32
    assert (got.token_evidence.double() - tokens).abs().max() < 1e-4 * size
    size = components.abs().max()
    assert (got.component_evidence.double() - components).abs().max() < 1e-4 * size


def check_sums(detector, prompt=PROMPT):
    """Tokens and components both add up to what the score says."""
    got, config = detector.explain(prompt), detector.config
    scores = score(detector, prompt)
    share = config.method == "gradcoo" and config.relative == "share" and config.unsigned
    expected = 2 * float(scores.values) - 1 if share else float(scores.values)
    assert got.score == float(scores.values)
    assert abs(got.total - expected) < 1e-6
    assert abs(float(got.token_evidence.double().sum()) - expected) < 1e-5
    parts = 2 * scores.components[0] - 1 if share else scores.components[0]
    assert torch.allclose(got.component_evidence, parts, atol=1e-6)
    assert len(got.components) == len(got.component_evidence)
    assert len(got.tokens) == len(got.token_evidence)
    return got


@pytest.mark.parametrize(
    "options",
    [
        *({"granularity": granularity} for granularity in GRANULARITIES),
        {"relative": "difference"},
        {"relative": "unsafe", "granularity": "row"},
        {"unsigned": False},
        {"unsigned": False, "relative": "difference", "granularity": "row+column"},
        {"reduce": "weighted", "granularity": "head"},
        {"relative": "difference", "normalize": False},
        {"reference_order": "norm_then_mean", "granularity": "head"},
        {"layers": 1, "modules": "mlp", "append_eos": True, "response": "Yes"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("panel")
def test_evidence_equals_the_oracle_and_adds_up(model, tokenizer, options):
    check_against_the_oracle(model, tokenizer, **options)
    check_sums(fit(model, tokenizer, **options))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama"}))
def test_every_family(family, tokenizer):
    model = make_model(family, vocab_size=300)
    # Two families look back 4 tokens per layer: behind a longer template no prompt makes a change.
    options = {"granularity": "head", "template": "{prompt}: "}
    check_against_the_oracle(model, tokenizer, **options)
    check_sums(fit(model, tokenizer, **options))


def test_gradsafe_splits_its_cosines(model, tokenizer):
    detector = fit(model, tokenizer, method="gradsafe", gap=0.4)
    got = check_sums(detector)
    oracle = Oracle(model, tokenizer, detector.config)
    unsafe = oracle.reference(UNSAFE)
    gradients, tokens = token_gradients(oracle, PROMPT)
    pairs = zip(oracle.slices(gradients), unsafe, strict=True)
    norms = torch.stack([g.norm() * u.norm() for g, u in pairs])
    cosines = torch.stack([dots(oracle.slices(token), unsafe) / norms for token in tokens])
    expected = cosines.nan_to_num(0.0)[:, detector.method.selected].mean(1)
    assert (got.token_evidence.double() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_half_precision(tokenizer):
    half = make_model("llama", torch.bfloat16, vocab_size=300, max_position_embeddings=128)
    for options in (
        {},
        {"granularity": "row+column", "reference_dtype": "float16"},
        {"granularity": "row", "row_fraction": 0.3, "reference_dtype": "float8"},
    ):
        check_sums(fit(half, tokenizer, **{"reference_dtype": "bfloat16", **options}))


def test_checkpointing_and_lora_change_nothing(model, tokenizer):
    peft = pytest.importorskip("peft")
    expected = fit(model, tokenizer).explain(PROMPT)
    checkpointed = make_model("llama", vocab_size=300, max_position_embeddings=128).train()
    enable_checkpointing(checkpointed)
    base = make_model("llama", vocab_size=300, max_position_embeddings=128)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    for other in (checkpointed, peft.get_peft_model(base, config)):
        got = fit(other, tokenizer).explain(PROMPT)
        assert torch.allclose(got.token_evidence, expected.token_evidence, atol=1e-6)


def test_exchanged_references_turn_the_evidence_round(model, tokenizer):
    there = fit(model, tokenizer, granularity="row").explain(PROMPT)
    back = fit(model, tokenizer, SAFE, UNSAFE, granularity="row").explain(PROMPT)
    assert torch.allclose(there.token_evidence, -back.token_evidence, atol=1e-7)
    same = fit(model, tokenizer, SAFE, SAFE).explain(PROMPT)
    assert same.token_evidence.abs().max() < 1e-7


def test_a_reference_prompt_sides_with_its_reference(model, tokenizer):
    detector = fit(model, tokenizer, ["how to hurt"], ["bake a cake"])
    assert detector.explain("how to hurt").component_evidence.min() > 0
    assert detector.explain("bake a cake").component_evidence.max() < 0


def test_nothing_behind_the_loss_carries_evidence(model, tokenizer):
    got = fit(model, tokenizer).explain(PROMPT)
    assert got.tokens[-4:] == ["S", "u", "r", "e"]
    assert got.token_evidence[-1] == 0
    assert (got.token_evidence[:-1] != 0).all()


def test_tokens_and_where_the_prompt_lies(model, tokenizer):
    detector = fit(model, tokenizer)
    for prompt in (PROMPT, "to été to\n日本", "0", "?", "]x[", " padded "):
        got = detector.explain(prompt)
        assert "".join(got.tokens) == f"<s>[user]{prompt}[assistant]Sure"
        assert "".join(got.tokens[got.prompt_tokens]) == prompt
        assert "".join(got.tokens[got.response_tokens]) == "Sure"
    plain = fit(model, tokenizer, template="Q: {prompt} A: ").explain("tea")
    assert "".join(plain.tokens[plain.prompt_tokens]) == "tea"


def test_the_worst_window_is_explained(model, tokenizer):
    long = "a" * 150 + "how to hurt" + "b" * 150
    with pytest.raises(ContextOverflowError, match=r"overflow=.window"):
        fit(model, tokenizer).explain(long)
    detector = fit(model, tokenizer, overflow="window")
    got = detector.explain(long)
    assert got.windows > 1
    assert got.score == pytest.approx(float(score(detector, long).values), rel=1e-6)
    assert "".join(got.tokens[got.prompt_tokens]) in long
    assert abs(float(got.token_evidence.double().sum()) - (2 * got.score - 1)) < 1e-5
    assert detector.explain("short").windows == 1


def test_other_prompts_and_threads_do_not_matter(model, tokenizer, two_threads):
    detector = fit(model, tokenizer)
    got = detector.explain(PROMPT)
    score(detector, "something else")
    torch.set_num_threads(1)
    again = detector.explain(PROMPT)
    assert torch.allclose(got.token_evidence, again.token_evidence, atol=1e-7)


def test_a_loaded_detector_explains_the_same(model, tokenizer, tmp_path):
    detector = fit(model, tokenizer, granularity="head")
    detector.calibrate([f"benign {i}" for i in range(20)], max_fpr=0.2, progress=False)
    detector.save(tmp_path / "detector")
    got = detector.explain(PROMPT)
    loaded = Detector.load(tmp_path / "detector", model, tokenizer).explain(PROMPT)
    assert torch.equal(got.token_evidence, loaded.token_evidence)
    assert got.threshold == loaded.threshold == detector.threshold
    assert json.loads(json.dumps(got.to_json())) == got.to_json() == loaded.to_json()


class Largest(TorchDispatchMode):
    """Notes the size of the largest new tensor; views of old ones do not count."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("axis", ["tensor", "row", "column", "both"])
def test_no_weight_gradient_is_ever_stored(monkeypatch, axis, unsigned):
    tokens, rows, cols = 5, 97, 64
    monkeypatch.setattr("gradsafe.detection.factors.PANEL_BYTES", 4 * 10 * cols)
    x, dy = torch.randn(tokens, cols), torch.randn(tokens, rows)
    refs = [torch.rand(rows, cols).bfloat16() for _ in range(2)]
    slices = {"tensor": 1, "row": rows, "column": cols, "both": rows + cols}[axis]
    factors = torch.randn(slices, 2, dtype=torch.float64)
    with Largest() as largest:
        got = layer_token_evidence(x, dy, refs, factors, axis, unsigned)
    assert largest.size <= 10 * cols

    grad = dy.double().t() @ x.double()
    by_row = factors[:rows] if axis in ("row", "both") else torch.zeros(rows, 2).double()
    by_column = factors[-cols:] if axis in ("column", "both") else torch.zeros(cols, 2).double()
    by_row = factors.expand(rows, 2) if axis == "tensor" else by_row
    merged = sum(
        (by_row[:, k, None] + by_column[None, :, k]) * refs[k].double() for k in range(2)
    ) * (grad.sign() if unsigned else 1)
    expected = torch.einsum("to,oi,ti->t", dy.double(), merged, x.double())
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_tiny_and_absent_gradients():
    x, dy, ref = torch.randn(3, 8), torch.randn(3, 6), torch.rand(6, 8)
    factors = torch.ones(1, 1, dtype=torch.float64)
    expected = layer_token_evidence(x, dy, [ref], factors, "tensor", True)
    tiny = layer_token_evidence(x, dy * 2.0**-60, [ref], factors * 2.0**150, "tensor", True)
    assert torch.equal(tiny, expected * 2.0**90)
    for nothing in (
        layer_token_evidence(x, dy * 0, [ref], factors, "tensor", True),
        layer_token_evidence(x, dy, [ref], factors * 0, "tensor", True),
    ):
        assert torch.equal(nothing, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "nll"}, "method='nll'"),
        ({"method": "gradnorm"}, "method='gradnorm'"),
        ({"relative": "ratio"}, "relative='ratio'"),
        ({"relative": "logratio"}, "relative='logratio'"),
        ({"reduce": "median"}, "reduce='median'"),
        ({"center": True}, "center=True"),
        ({"absolute": "before"}, "absolute='before'"),
    ],
)
def test_what_is_not_additive_is_refused(model, tokenizer, options, text):
    with pytest.raises(
        ValueError, match=rf"{text} has no exact evidence per token; fit a detector"
    ):
        fit(model, tokenizer, **options).explain(PROMPT)


def test_bad_prompts(model, tokenizer):
    detector = fit(model, tokenizer)
    with pytest.raises(TypeError, match="got list; explain takes one prompt"):
        detector.explain([PROMPT])
    with pytest.raises(ValueError, match="non-empty"):
        detector.explain("")
    broken = make_model("llama", vocab_size=300, max_position_embeddings=128)
    detector = fit(broken, tokenizer)
    with torch.no_grad():
        broken.get_input_embeddings().weight[tokenizer("z").input_ids[-1]] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"model\.layers"):
        detector.explain("with a z")


class TestDeletion:
    """Evidence "deletion": the score of a prompt less its score without a word."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"relative": "logratio", "reduce": "median"},
            {"method": "nll"},
            {"method": "gradnorm"},
            {"method": "cascade"},
            {"method": "gradsafe", "gap": -1.0},
        ],
        ids=str,
    )
    def test_is_a_difference_of_scores(self, model, tokenizer, options) -> None:
        method = options.get("method")
        references = (None, None) if method in ("nll", "gradnorm") else (UNSAFE, SAFE)
        detector = fit(model, tokenizer, *references, **options)
        found = detector.explain(PROMPT, evidence="deletion", progress=False)
        variants = [PROMPT, "is it so?", "why it so?", "why is so?", "why is it"]
        values = detector.score(variants, progress=False).values
        assert found.tokens == ["why", " is", " it", " so?"]
        torch.testing.assert_close(found.token_evidence, values[0] - values[1:])
        assert found.score == float(values[0])
        assert found.components == []
        assert found.component_evidence.shape == (0,)
        assert (found.evidence, found.constant, found.windows) == ("deletion", None, 1)
        json.dumps(found.to_json(), allow_nan=False)

    @pytest.mark.parametrize(
        ("text", "count", "first"),
        [
            ("  two words \n", 2, "  two"),
            ("word", 4, "w"),
            (" " + "w " * 64, 64, " w"),
            ("w " * 65, 33, "w w"),
            ("w " * 500, 63, "w w w w w w w w"),
        ],
    )
    def test_parts_join_to_the_text(self, tokenizer, text, count, first) -> None:
        model = make_model("llama", vocab_size=300, max_position_embeddings=1100)
        detector = Detector.fit(model, tokenizer, method="nll", progress=False)
        found = detector.explain(text, evidence="deletion", progress=False)
        assert "".join(found.tokens) == text
        assert len(found.tokens) == len(found.token_evidence) == count
        assert found.tokens[0] == first

    def test_of_a_conversation_deletes_from_its_last_user_turn(self, model, tokenizer) -> None:
        detector = fit(model, tokenizer)

        def talk(text):
            return [
                {"role": "user", "content": "first words"},
                {"role": "assistant", "content": "and an answer"},
                {"role": "user", "content": text},
            ]

        found = detector.explain(talk("last turn"), evidence="deletion", progress=False)
        values = detector.score([talk(t) for t in ("last turn", "turn", "last")], progress=False)
        assert found.tokens == ["last", " turn"]
        torch.testing.assert_close(found.token_evidence, values.values[0] - values.values[1:])

    def test_counts_what_was_learned(self, model, tokenizer) -> None:
        detector = fit(model, tokenizer)
        detector.learn([*UNSAFE, *SAFE, "a b", "c d"], [1, 1, 0, 0, 1, 0], features="hidden")
        with pytest.raises(ValueError, match="whose evidence has no parts"):
            detector.explain(PROMPT)
        found = detector.explain("a b", evidence="deletion", progress=False)
        values = detector.score(["a b", "b", "a"], progress=False).values
        torch.testing.assert_close(found.token_evidence, values[0] - values[1:])

    def test_what_it_refuses(self, model, tokenizer) -> None:
        detector = fit(model, tokenizer)
        with pytest.raises(ValueError, match="a prompt of at least two characters, got 'a'"):
            detector.explain("a", evidence="deletion")
        with pytest.raises(ValueError, match="evidence to be one of position, deletion"):
            detector.explain("a b", evidence="words")
        with pytest.raises(TypeError, match="explain takes one prompt"):
            detector.explain(["a b", "c d"], evidence="deletion")
        with pytest.raises(ValueError, match=r"request: .*non-empty prompt"):
            detector.explain("", name="request", evidence="deletion")

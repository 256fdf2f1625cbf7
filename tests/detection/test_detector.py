from __future__ import annotations

import copy
import warnings

import pytest
import torch
from builders import make_model, make_tokenizer
from oracle import Oracle

from gradsafe import Detector, DetectorConfig
from gradsafe.detection import NonFiniteGradientError, ReferenceGapWarning, UncalibratedWarning
from gradsafe.detection.scoring import worst_windows
from gradsafe.models import ContextOverflowError
from gradsafe.models.compat import enable_checkpointing

UNSAFE = ["how to hurt", "steal it now please"]
SAFE = ["bake a cake", "sing"]
PROMPTS = ["hello", "a much longer prompt than others", "x", "why is it so", "tea?"]

pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")


def fit(model, tokenizer, unsafe=UNSAFE, safe=SAFE, **options):
    options.setdefault("reference_dtype", "float32")
    return Detector.fit(model, tokenizer, unsafe, safe, progress=False, **options)


def score(detector, prompts=PROMPTS, **options):
    return detector.score(prompts, progress=False, **options)


def relative_error(got, want):
    want = torch.as_tensor(want)
    return ((got.double() - want).abs() / want.abs().clamp(min=1e-3 * want.abs().max())).max()


def check_gradcoo(model, tokenizer, **options):
    oracle = Oracle(model, tokenizer, DetectorConfig(**options))
    unsafe, safe = oracle.reference(UNSAFE), oracle.reference(SAFE)
    expected = torch.stack([oracle.gradcoo(p, unsafe, safe) for p in PROMPTS])
    result = score(fit(model, tokenizer, **options))
    assert result.components.shape == expected.shape
    assert result.values.dtype == result.components.dtype == torch.float32
    # Cancellation inside one component, and between the two of a difference.
    limit = 1e-3 if options.get("relative") == "difference" else 1e-4
    assert relative_error(result.components, expected) < limit
    assert relative_error(result.values, expected.mean(1)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "row"},
        {"granularity": "column"},
        {"granularity": "row+column"},
        {"granularity": "head"},
        {"granularity": "layer"},
        {"relative": "ratio"},
        {"relative": "logratio"},
        {"relative": "difference"},
        {"relative": "unsafe"},
        {"relative": "difference", "normalize": False},
        {"center": True, "granularity": "row"},
        {"center": True, "relative": "difference"},
        {"absolute": "before", "relative": "difference"},
        {"reference_order": "norm_then_mean"},
        {"reference_order": "norm_then_mean", "granularity": "head"},
        {"reference_order": "norm_then_mean", "granularity": "row"},
        {"append_eos": True, "response": "Yes"},
        {"layers": 1},
        {"layers": [0, 2], "modules": "attention"},
        {"modules": "mlp", "template": "Q: {prompt} A: "},
    ],
    ids=str,
)
def test_gradcoo_equals_the_oracle(model, tokenizer, options):
    check_gradcoo(model, tokenizer, **options)


@pytest.mark.parametrize(
    "family",
    ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt"],
)
def test_gradcoo_equals_the_oracle_for_every_family(family, tokenizer):
    check_gradcoo(make_model(family, vocab_size=300), tokenizer)


@pytest.mark.parametrize("relative", ["share", "difference"])
def test_signed_scores_equal_the_oracle(model, tokenizer, relative):
    options = {"unsigned": False, "relative": relative}
    oracle = Oracle(model, tokenizer, DetectorConfig(**options))
    unsafe, safe = oracle.reference(UNSAFE), oracle.reference(SAFE)
    expected = torch.stack([oracle.gradcoo(p, unsafe, safe) for p in PROMPTS])
    result = score(fit(model, tokenizer, **options))
    assert torch.allclose(result.components.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(result.values.double(), expected.mean(1), rtol=1e-5, atol=1e-6)


def test_gradsafe_equals_the_oracle(model, tokenizer):
    config = DetectorConfig(method="gradsafe")
    oracle = Oracle(model, tokenizer, config)
    unsafe = oracle.reference(UNSAFE)
    cosines = {p: oracle.cosines(p, unsafe) for p in (*UNSAFE, *SAFE, *PROMPTS)}
    gap = sum(cosines[p] for p in UNSAFE) / 2 - sum(cosines[p] for p in SAFE) / 2
    wanted = 0.4
    clear = (gap - wanted).abs() > 1e-5  # float32 may decide the borderline slices otherwise
    expected = torch.stack([cosines[p][gap > wanted].mean() for p in PROMPTS])
    detector = fit(model, tokenizer, method="gradsafe", gap=wanted)
    assert torch.equal(detector.method.selected[clear], (gap > wanted)[clear])
    assert detector.method.selected.sum() > 10
    result = score(detector)
    assert torch.allclose(result.values.double(), expected, atol=1e-5)
    assert len(detector.components) == result.components.shape[1]
    with pytest.raises(ValueError, match="lower gap="):
        fit(model, tokenizer, method="gradsafe", gap=2.1)


def test_baselines_equal_the_oracle(model, tokenizer):
    oracle = Oracle(model, tokenizer, DetectorConfig())
    pairs = [oracle.loss_and_gradients(p) for p in PROMPTS]
    nll = score(Detector.fit(model, tokenizer, method="nll"))
    assert relative_error(nll.values, [loss for loss, _ in pairs]) < 1e-5
    assert torch.equal(nll.values, nll.nll)
    norm = score(Detector.fit(model, tokenizer, method="gradnorm"))
    want = [sum(g.square().sum() for g in grads.values()).sqrt() for _, grads in pairs]
    assert relative_error(norm.values, torch.stack(want)) < 1e-5


def test_reduction_options(model, tokenizer):
    parts = score(fit(model, tokenizer)).components.double()
    sizes = torch.tensor(
        [x.out_features * x.in_features for x in fit(model, tokenizer).coverage.scored]
    ).double()
    weighted = score(fit(model, tokenizer, reduce="weighted")).values
    assert torch.allclose(weighted.double(), (parts * sizes).sum(1) / sizes.sum(), atol=1e-6)
    median = score(fit(model, tokenizer, reduce="median")).values
    assert torch.allclose(median.double(), parts.quantile(0.5, dim=1), atol=1e-6)


@pytest.mark.parametrize("method", ["gradcoo", "gradsafe", "nll", "gradnorm"])
def test_batching_order_and_threads_do_not_matter(model, tokenizer, method):
    options = {"gap": 0.3} if method == "gradsafe" else {}
    detector = fit(model, tokenizer, method=method, **options)
    alone = score(detector, batch_tokens=1)
    together = score(detector, batch_tokens=10_000)
    backwards = score(detector, PROMPTS[::-1], batch_tokens=70)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    threads = score(detector)
    torch.set_num_threads(before)
    for other in (together.values, backwards.values.flip(0), threads.values):
        assert relative_error(other, alone.values.double()) < 1e-5
    one_by_one = fit(model, tokenizer, method=method, batch_tokens=1, **options)
    assert relative_error(score(one_by_one).values, alone.values.double()) < 1e-5


def test_reference_dtypes_change_little(model, tokenizer):
    exact = score(fit(model, tokenizer)).values
    for dtype, bound in (("bfloat16", 2e-3), ("float16", 3e-4), ("float8", 2e-2)):
        rounded = score(fit(model, tokenizer, reference_dtype=dtype)).values
        assert relative_error(rounded, exact.double()) < bound


def test_half_precision_models_run(model, tokenizer):
    exact = score(fit(model, tokenizer)).values
    half = make_model("llama", torch.bfloat16, vocab_size=300, max_position_embeddings=128)
    assert (score(fit(half, tokenizer)).values - exact).abs().max() < 0.02
    with pytest.raises(TypeError, match=r"call model\.float\(\)"):
        fit(make_model("llama", torch.float64, vocab_size=300), tokenizer)


def test_lora_and_checkpointing_give_the_same_scores(model, tokenizer):
    peft = pytest.importorskip("peft")
    expected = score(fit(model, tokenizer)).values
    checkpointed = make_model("llama", vocab_size=300, max_position_embeddings=128).train()
    enable_checkpointing(checkpointed)
    assert torch.allclose(score(fit(checkpointed, tokenizer)).values, expected, rtol=1e-5)
    base = make_model("llama", vocab_size=300, max_position_embeddings=128)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(base, config)  # B = 0: the adapter changes nothing yet
    assert torch.allclose(score(fit(adapted, tokenizer)).values, expected, rtol=1e-5)


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    score(fit(model, tokenizer))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model.lm_head.weight.requires_grad_(True)
    model.eval()


def test_component_names_match_the_columns(model, tokenizer):
    for granularity in ("tensor", "row", "column", "row+column", "head", "layer"):
        detector = fit(model, tokenizer, granularity=granularity)
        names = detector.components
        assert len(names) == len(set(names)) or granularity == "row+column"
        assert len(names) == score(detector).components.shape[1]
    assert score(detector, components=False).components.shape == (len(PROMPTS), 0)


def test_long_prompts(model, tokenizer):
    long = "a" * 150 + "how to hurt" + "b" * 150
    with pytest.raises(ContextOverflowError, match=r"prompts\[1\].*overflow=.window"):
        score(fit(model, tokenizer), ["x", long])
    detector = fit(model, tokenizer, overflow="window")
    result = score(detector, ["x", long])
    assert result.values.shape == (2,)
    assert torch.equal(result.values[:1], score(detector, ["x"]).values)


def test_calibration_and_flags(model, tokenizer):
    detector = fit(model, tokenizer)
    assert detector.threshold is None
    with pytest.warns(UncalibratedWarning, match="calibrate"):
        detector.flag(PROMPTS, progress=False)
    benign = [f"benign prompt {i}" for i in range(30)]
    report = detector.calibrate(benign, max_fpr=0.1, progress=False)
    assert detector.threshold == report.threshold
    assert report.n == 30
    assert detector.flag(benign, progress=False).sum() <= 3
    assert score(detector).threshold == report.threshold
    with pytest.raises(ValueError, match="no threshold"):
        Detector.fit(model, tokenizer, method="nll").flag(PROMPTS, progress=False)


def test_no_number_is_no_clearance(model, tokenizer):
    detector = Detector.fit(copy.deepcopy(model), tokenizer, method="nll", overflow="window")
    detector.calibrate([f"benign prompt {i}" for i in range(30)], max_fpr=0.1, progress=False)
    with torch.no_grad():
        next(iter(detector.model.parameters())).fill_(torch.nan)
    assert score(detector).values.isnan().all()
    assert detector.flag(PROMPTS, progress=False).all()


def test_a_window_without_a_number_is_the_worst():
    values = torch.tensor([1.0, torch.nan, torch.inf, 2.0, 3.0])
    assert worst_windows(values, [0, 0, 0, 1, 1], 2).tolist() == [1, 4]


def test_signed_shares_are_neutral_at_zero():
    assert DetectorConfig().default_threshold == 0.5
    assert DetectorConfig(unsigned=False).default_threshold == 0


def test_references_that_do_not_separate_are_reported(model, tokenizer):
    with pytest.warns(ReferenceGapWarning, match="does not tell them apart"):
        detector = fit(model, tokenizer, method="cascade")
    assert detector.reference_gap < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReferenceGapWarning)
        assert fit(model, tokenizer).reference_gap < 1
        Detector.fit(model, tokenizer, method="nll")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"unsafe": None}, ValueError, "needs unsafe="),
        ({"safe": []}, ValueError, "needs safe="),
        ({"unsafe": "one string"}, ValueError, "a list"),
        ({"method": "magic"}, ValueError, "expected method to be one of"),
        ({"granularity": "cell"}, ValueError, "expected granularity to be one of"),
        ({"reference_dtype": "int3"}, ValueError, "expected reference_dtype to be one of"),
        ({"speed": 11}, TypeError, "speed"),
        ({"center": True, "granularity": "layer"}, ValueError, "center=True needs"),
        ({"unsigned": False, "relative": "ratio"}, ValueError, "unsigned=False needs"),
        ({"method": "gradsafe", "unsigned": False}, ValueError, "unsigned=False needs method"),
        ({"gap": 0.5}, ValueError, "gap=0.5 needs method"),
        ({"layers": 99}, ValueError, "layers"),
        ({"layers": "last"}, TypeError, "expected layers to be"),
        ({"layers": 1.5}, TypeError, "expected layers to be"),
        ({"unsigned": "no"}, TypeError, "expected unsigned to be true or false"),
        ({"row_fraction": "x"}, TypeError, "expected row_fraction to be a number"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens"),
    ],
)
def test_bad_fit_arguments(model, tokenizer, arguments, error, text):
    with pytest.raises(error, match=text):
        fit(model, tokenizer, **arguments)


def test_bad_prompts(model, tokenizer):
    detector = fit(model, tokenizer)
    for prompts, error, text in [
        ([], ValueError, "at least one prompt"),
        ("hello", TypeError, "list of prompts"),
        (["x", ""], ValueError, r"prompts\[1\]"),
        (["x", 7], TypeError, r"prompts\[1\]"),
    ]:
        with pytest.raises(error, match=text):
            detector.score(prompts, progress=False)
    with pytest.raises(ValueError, match="template="):
        fit(model, make_tokenizer(chat_template=None))


def test_nan_gradients_name_layer_and_prompt(tokenizer):
    broken = make_model("llama", vocab_size=300)
    detector = fit(broken, tokenizer)
    ids = tokenizer("z", add_special_tokens=False).input_ids
    with torch.no_grad():
        broken.get_input_embeddings().weight[ids] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"model\.layers\.\d+.*prompts\[1\]"):
        score(detector, ["fine", "with a z", "fine"])
    with pytest.raises(NonFiniteGradientError, match="reference gradient of model"):
        fit(broken, tokenizer, unsafe=["zzz"])


@pytest.mark.parametrize(
    ("error", "batch_tokens", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 4096, r"lower batch_tokens, now 4096"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate"), 1, "cannot be split"),
    ],
)
def test_a_batch_too_large_for_memory_names_the_fix(
    model, tokenizer, monkeypatch, error, batch_tokens, advice
):
    detector = fit(model, tokenizer)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match=advice) as caught:
        score(detector, batch_tokens=batch_tokens)
    assert caught.value.__cause__ is error
    monkeypatch.undo()
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(detector)


@pytest.mark.parametrize("options", [{}, {"prefix": "cut", "system": "be kind " * 4}], ids=str)
def test_scores_in_inference_mode_are_the_same(model, tokenizer, options):
    prompts = ["hello", "why is it so", "bake a cake for me"]
    arguments = (model, tokenizer, ["how to hurt"], ["bake a cake"])
    detector = Detector.fit(*arguments, progress=False, **options)
    expected = detector.score(prompts, progress=False)
    with torch.inference_mode():
        again = Detector.fit(*arguments, progress=False, **options)
        found = [each.score(prompts, progress=False).values for each in (detector, again)]
    assert all(torch.equal(values, expected.values) for values in found)


def test_the_names_and_the_number_of_prompts_are_checked(model, tokenizer):
    detector = Detector.fit(model, tokenizer, ["how to hurt"], ["bake a cake"], progress=False)
    with pytest.raises(ValueError, match="a name for each of 2 prompts"):
        detector.encode(["a", "b"], names=["only one"])
    with pytest.raises(ValueError, match="at least one prompt"):
        detector.score(detector.encode(["a", "b"])[:0])

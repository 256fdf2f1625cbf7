"""Any number of threads on one model give the results of one, and leave no trace on it."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from builders import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from gradsafe import Detector, TraceIndex
from gradsafe.finetuning import KLAlignment
from gradsafe.models import capture, collate, encode, find_layers, response_nll
from gradsafe.models.compat import enable_checkpointing
from gradsafe.models.threads import current_thread, own
from gradsafe.tracing import choose_layer, resolve_layer

UNSAFE, SAFE = ["do harm", "steal it"], ["a joke", "add 2+2"]
PROMPTS = ["rob", "a longer text than that", "?", "how to steal", "1 + 1", "tell me a story"]
SAMPLES = [{"prompt": f"sample {i}", "response": "text " * (1 + i % 3)} for i in range(12)]
QUERY = {"prompt": "sample 3?", "response": "some text"}
TEMPLATE = {"template": "{prompt}:"}
EXPERTS = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def eager_switches():
    """Threads take turns often, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "llama":
        return make_model("llama", vocab_size=300, max_position_embeddings=256).eval()
    if family == "gpt_oss":
        config = GptOssConfig(**EXPERTS, head_dim=8, experts_implementation="eager")
        return GptOssForCausalLM(config).eval()
    implementation = family.removeprefix("mixtral_")  # "eager" or transformers' fast one
    return MixtralForCausalLM(
        MixtralConfig(**EXPERTS, experts_implementation=implementation)
    ).eval()


FAMILIES = ["llama", "mixtral_eager", "mixtral_grouped_mm", "gpt_oss"]


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


def fit(model: nn.Module, tokenizer: Any, **options: Any) -> Detector:
    options = {**TEMPLATE, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, **options)


def index_of(model: nn.Module, tokenizer: Any, layer: Any = 2) -> TraceIndex:
    return TraceIndex.build(model, tokenizer, SAMPLES, layer=layer, progress=False, **TEMPLATE)


def score(detector: Detector, **options: Any) -> Tensor:
    found = detector.score(PROMPTS, batch_tokens=64, progress=False, **options)
    return torch.cat([found.values[:, None], found.nll[:, None], found.components], 1)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a pass changes for a while."""
    modules = dict(model.named_modules())
    return {
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in modules.items()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()
        },
        "configs": {n: id(m.config) for n, m in modules.items() if hasattr(m, "config")},
        "experts": getattr(model.config, "_experts_implementation", None),
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "modes": len(_get_current_function_mode_stack()),
    }


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Runs the jobs at the same time, each in a thread; their results, or the first error."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def beside(foreign: Callable[[], Any], job: Callable[[], Any], threads: int = 2) -> Any:
    """Result of the job while other threads repeat `foreign`."""
    done = threading.Event()

    def repeat() -> int:
        rounds = 0
        while not done.is_set() or not rounds:
            foreign()
            rounds += 1
        return rounds

    def run() -> Any:
        try:
            return job()
        finally:
            done.set()

    *rounds, result = together(*[repeat] * threads, run)
    assert min(rounds) > 0
    return result


def same(found: list[Tensor], expected: Tensor) -> None:
    for values in found:
        assert torch.equal(values, expected)


@pytest.mark.parametrize("method", ["gradcoo", "gradsafe", "nll"])
def test_sixteen_threads_score_as_one(tokenizer, method):
    model = build("llama")
    options = {"gap": -1.0} if method == "gradsafe" else {}
    detector = fit(model, tokenizer, method=method, **options)
    expected, before = score(detector), state(model)
    same(together(*[lambda: score(detector)] * 16), expected)
    assert state(model) == before


def test_threads_score_experts_as_one(model, tokenizer):
    detector = fit(model, tokenizer)
    expected, before = score(detector), state(model)
    same(together(*[lambda: score(detector)] * 8), expected)
    assert state(model) == before


def test_a_model_in_training_mode_stays_there(tokenizer):
    model = build("llama")
    detector = fit(model, tokenizer)
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    expected, before = score(detector), state(model)
    same(together(*[lambda: score(detector)] * 8), expected)
    assert state(model) == before


@pytest.mark.parametrize("gradients", [False, True])
def test_foreign_forward_passes_neither_disturb_nor_are_disturbed(model, tokenizer, gradients):
    detector = fit(model, tokenizer)
    ids = torch.arange(3, 60).view(1, -1)
    expected, before = score(detector), state(model)
    with torch.no_grad():
        logits = model(ids).logits

    def foreign() -> None:
        with torch.set_grad_enabled(gradients):
            assert torch.equal(model(ids).logits, logits)

    same(beside(foreign, lambda: [score(detector) for _ in range(5)]), expected)
    assert state(model) == before


@pytest.mark.parametrize("family", ["llama", "mixtral_grouped_mm"])
def test_foreign_generation_keeps_its_text(family, tokenizer):
    # Generation holds a cache, and switches the implementation of experts for its own time.
    model = build(family)
    detector = fit(model, tokenizer)
    ids = torch.arange(3, 20).view(1, -1)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected, text, before = score(detector), model.generate(ids, **options), state(model)

    def foreign() -> None:
        assert torch.equal(model.generate(ids, **options), text)

    same(beside(foreign, lambda: [score(detector) for _ in range(5)], threads=1), expected)
    assert state(model) == before


def test_foreign_forward_pass_is_not_captured(model, tokenizer):
    layers = find_layers(model)
    batch = collate([encode(tokenizer, "rob", "Sure", **TEMPLATE)], 0)
    ids = torch.arange(3, 40).view(1, -1)
    seen: list[tuple[int, ...]] = []
    with capture(model, layers, lambda layer, x, *_: seen.append(tuple(x.shape))):
        loss = response_nll(model, batch).sum()
        # Between forward and backward, and a graph of its own that must not deliver either.
        (output,) = together(lambda: model(ids, use_cache=False).logits)
        assert not output.requires_grad
        loss.backward()
    assert len(seen) == len(layers.scored)
    width = batch.input_ids.shape[1]
    assert all(width in shape or shape[0] % width == 0 for shape in seen)


def test_methods_of_a_detector_run_together(tokenizer):
    model = build("llama")
    detector = fit(model, tokenizer)
    expected, evidence = score(detector), detector.explain("rob").token_evidence
    detector.calibrate(PROMPTS, 0.5, progress=False)
    flags, before = detector.flag(PROMPTS, progress=False), state(model)

    def scored() -> Tensor:
        return score(detector)

    def calibrated() -> float:
        return detector.calibrate(PROMPTS, 0.5, progress=False).threshold

    def fitted() -> Tensor:
        return score(Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, **TEMPLATE))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = together(
            *[scored, calibrated, fitted, lambda: detector.explain("rob").token_evidence] * 2,
            lambda: detector.flag(PROMPTS, progress=False),
        )
    same([*found[0:8:4], *found[2:8:4]], expected)
    same(found[3:8:4], evidence)
    same(found[8:], flags)
    assert set(found[1:8:4]) == {detector.threshold}
    assert state(model) == before


def test_a_score_and_its_threshold_belong_to_one_calibration(tokenizer):
    model = build("llama")
    detector = fit(model, tokenizer, method="cascade")
    calls = iter([0.1, 0.4] * 20)

    def calibrate() -> None:
        detector.calibrate(PROMPTS, next(calls), progress=False, unsafe_prompts=UNSAFE, max_fnr=0.4)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = []
        for _ in range(2):
            calibrate()
            known.append((score(detector)[:, 0].tolist(), detector.threshold))

        def scored() -> list[Any]:
            found = detector.score(PROMPTS, batch_tokens=64, progress=False)
            return [found.values.tolist(), found.threshold]

        found = beside(calibrate, lambda: [scored() for _ in range(10)], threads=1)
    for values, threshold in found:
        assert (values, threshold) in known


def test_fit_in_one_thread_and_score_in_another(tokenizer):
    model = build("mixtral_eager")
    (detector,) = together(lambda: fit(model, tokenizer))
    expected = score(detector)
    same(together(lambda: score(detector)), expected)

    def fitted() -> Tensor:
        return score(Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, **TEMPLATE))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(together(*[fitted, lambda: score(detector)] * 3), expected)


def test_two_detectors_and_an_index_share_a_model(tokenizer):
    base = build("llama")
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    one, two = fit(model, tokenizer), fit(base, tokenizer, layers=1, row_fraction=0.5)
    index = index_of(model, tokenizer)
    jobs = [
        lambda: score(one),
        lambda: score(two),
        lambda: index.query(QUERY, k=4).scores,
    ]
    expected, before = [job() for job in jobs], state(model)
    for number, values in enumerate(together(*jobs * 4)):
        assert torch.equal(values, expected[number % 3])
    assert state(model) == before


@pytest.mark.parametrize("layer", [0, 2, "last"])
def test_eight_threads_query_as_one(tokenizer, layer):
    model = build("llama")
    index = index_of(model, tokenizer, layer)
    ids = torch.arange(3, 40).view(1, -1)
    first, before = index.query(QUERY, k=4), state(model)
    tokens = first.tokens()
    with torch.no_grad():
        logits = model(ids).logits

    def query() -> tuple[Any, ...]:
        hits = index.query(QUERY, k=4)
        return hits.ids, hits.scores.tolist(), hits.tokens()

    def foreign() -> None:
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)

    found = beside(foreign, lambda: together(*[query] * 8))
    assert found == [(first.ids, first.scores.tolist(), tokens)] * 8
    assert state(model) == before


def test_choosing_a_layer_beside_others(tokenizer):
    model = build("llama").train()
    probes = [encode(tokenizer, text, "Sure", **TEMPLATE) for text in PROMPTS]
    detector = fit(model, tokenizer)
    expected, choice, before = score(detector), choose_layer(model, probes, 0), state(model)
    found = together(*[lambda: choose_layer(model, probes, 0), lambda: score(detector)] * 4)
    assert found[::2] == [choice] * 4
    same(found[1::2], expected)
    assert state(model) == before


def test_queries_beside_an_extension(tokenizer, tmp_path):
    model = build("llama")
    index = TraceIndex.build(
        model, tokenizer, SAMPLES, tmp_path / "index", layer=2, progress=False, **TEMPLATE
    )
    more = [{**sample, "prompt": sample["prompt"] + "!"} for sample in SAMPLES]
    parts = [[{**row, "id": 100 * n + i} for i, row in enumerate(more)] for n in (1, 2, 3)]

    def query() -> tuple[int, int]:
        return len(index.query(QUERY, k=12).ids[0]), len(index)

    def extend() -> None:
        together(*[lambda part=part: index.extend(part, progress=False) for part in parts])

    beside(query, extend)
    assert sorted(set(index.ids) - set(range(12))) == sorted(r["id"] for p in parts for r in p)
    alone = TraceIndex.load(tmp_path / "index", model, tokenizer)
    assert alone.query(QUERY, k=20).ids == index.query(QUERY, k=20).ids


def test_one_thread_makes_what_queries_share(tokenizer, tmp_path, recwarn):
    pytest.importorskip("faiss")
    model = build("llama")
    index = TraceIndex.build(
        model, tokenizer, SAMPLES, tmp_path / "index", layer=2, progress=False, **TEMPLATE
    )

    def query() -> list[Any]:
        return index.query(QUERY, k=4, approximate=True).ids

    exact = index.query(QUERY, k=4).ids
    index = TraceIndex.load(tmp_path / "index", model, tokenizer)
    assert together(*[query] * 8) == [exact] * 8
    assert not [w for w in recwarn if "FAISS" in str(w.message) or "cannot" in str(w.message)]


def test_an_exception_in_one_thread_restores_all_flags(model, tokenizer):
    layers, detector = find_layers(model), fit(model, tokenizer)
    expected, before = score(detector), state(model)
    batch = collate([encode(tokenizer, "rob", "Sure", **TEMPLATE)], 0)

    def fail(kind: type[BaseException]) -> None:
        def consume(*_: Any) -> None:
            raise kind

        for _ in range(3):
            with pytest.raises(kind), capture(model, layers, consume):
                response_nll(model, batch).sum().backward()
            with pytest.raises(ValueError, match="non-empty prompt"):
                detector.score(["rob", ""], progress=False)

    def scored() -> Tensor:
        return score(detector)

    found = together(lambda: fail(OSError), scored, lambda: fail(KeyboardInterrupt), scored)
    same(found[1::2], expected)
    assert state(model) == before
    same([score(detector)], expected)


class Nested(torch.autograd.Function):
    """Calls the backward pass `depth` levels deep; autograd then goes on in another thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, innermost: Callable[[], None]) -> Tensor:
        ctx.depth, ctx.innermost = depth, innermost
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.depth == 0:
            ctx.innermost()
        else:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                Nested.apply(x, ctx.depth - 1, ctx.innermost).sum().backward()
        return grad, None, None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral_eager", "gpt_oss"])
def test_recomputation_in_a_thread_of_autograd_is_captured(family, reentrant, tokenizer):
    """As on CUDA devices, whose backward pass, and so the recomputation, has its own thread."""
    model = build(family)
    enable_checkpointing(model, use_reentrant=reentrant)
    layers = find_layers(model)
    batch = collate([encode(tokenizer, text, "Sure", **TEMPLATE) for text in PROMPTS[:2]], 0)

    def run(backward: Callable[[Tensor], None]) -> dict[str, tuple[Tensor, ...]]:
        found = {}

        def consume(layer: Any, x: Tensor, dy: Tensor, *_: Any) -> None:
            found[layer.name] = x.clone(), dy.clone()

        with torch.enable_grad(), capture(model, layers, consume):
            backward(response_nll(model, batch).sum())
        return found

    threads = set()

    def elsewhere(loss: Tensor) -> None:
        def innermost() -> None:
            threads.add(threading.get_ident())
            loss.backward()

        x = torch.ones(1, requires_grad=True)
        Nested.apply(x, 70, innermost).sum().backward()

    expected, found = run(Tensor.backward), run(elsewhere)
    assert threads
    assert threading.get_ident() not in threads
    assert len(expected) == len(layers.scored)
    for name, pair in expected.items():
        assert all(map(torch.equal, found[name], pair))


def test_alignment_beside_others(tokenizer):
    reference, model = build("llama"), build("llama")
    ids = torch.randint(3, 250, (2, 20))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    alignment = KLAlignment(model, reference)
    detector = fit(reference, tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.1)
        logits = model(ids).logits
    loss, expected = alignment(batch).detach(), score(detector)

    def foreign() -> None:
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
        assert torch.equal(score(detector), expected)

    before = state(model), state(reference)
    same(beside(foreign, lambda: [alignment(batch).detach() for _ in range(5)]), loss)
    assert (state(model), state(reference)) == before


def test_references_without_adapters_beside_others(tokenizer):
    model = get_peft_model(build("llama"), LoraConfig(init_lora_weights=False)).eval()
    alignment = KLAlignment(model, "adapter_off")
    ids = torch.randint(3, 250, (2, 20))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    detector = fit(model, tokenizer)
    expected, before = score(detector), state(model)
    inputs = alignment._inputs(batch)
    counted = torch.ones_like(ids).bool()

    def teach() -> None:
        alignment.reference.teacher(inputs, counted)(0, 4)

    same(beside(teach, lambda: [score(detector) for _ in range(5)]), expected)
    assert state(model) == before


def test_resolving_layers_needs_no_lock(tokenizer):
    """A server may ask for these at any time, also during a long capture."""
    model = build("llama")
    layers = find_layers(model)
    with capture(model, layers, lambda *_: None):
        assert together(lambda: resolve_layer(model, "last")) == [3]


def test_torch_frees_no_identity_that_is_in_use(monkeypatch):
    """Releases of torch below 2.13 keep an object without counting it, and release it later."""
    native, kept = torch._C._stash_obj_in_tls, []

    def uncounted(key: str, value: Any) -> None:
        before = sys.getrefcount(value)
        native(key, value)
        if sys.getrefcount(value) > before:
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(value))
        kept.append(value)

    monkeypatch.setattr(torch._C, "_stash_obj_in_tls", uncounted)

    def work() -> None:
        for _ in range(100):
            assert own(current_thread)() == threading.get_ident()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
        thread.join()
    end = time.monotonic() + 10
    # A thread releases its storage shortly after it is joined.
    while max(counts := [sys.getrefcount(value) for value in kept]) > 3 and time.monotonic() < end:
        time.sleep(0.01)
    if min(counts) < 3:
        for value in kept:  # or this process would end with a segmentation fault
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    assert len(kept) == len(threads)  # once in the life of a thread
    assert counts == [3] * len(threads)  # the list, the loop and the call

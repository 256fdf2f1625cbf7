from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from alignment_batches import make_batch
from builders import VOCABULARY, make_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gradsafe._io.artifacts import StorageError
from gradsafe.finetuning import KLAlignment, SFTAlignment
from gradsafe.finetuning.chunked_kl import chunked_kl
from gradsafe.finetuning.output_head import OutputHead
from gradsafe.ops import _default as reference


@pytest.fixture(autouse=True)
def _nothing_announced_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsafe._fallback._announced", set())


def disturbed(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """A copy of the model with other weights: what it becomes in training."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return other


def lora(model: nn.Module, zero: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(4)
    options.setdefault("target_modules", ["q_proj", "v_proj"])
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.3, **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name and not zero:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits


def plain_loss(
    student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], tokens: str = "response"
) -> Tensor:
    """The formula, with all logits."""
    response = functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    real = batch["attention_mask"].bool()
    counted = {"response": response, "non_pad": real, "all": torch.ones_like(real)}[tokens]
    with torch.no_grad():
        target = logits_of(teacher, batch)[counted]
    student_logits = logits_of(student, batch)[counted]
    dtype = torch.promote_types(target.dtype, torch.float32)
    return reference.kl_divergence(student_logits, target, dtype).sum() / response.sum()


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Within a tolerance of each tensor; gradients that are 0 but for rounding count as that."""
    assert found.keys() == wanted.keys()
    floor = 1e-4 * max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = (found[name] - gradient).abs().max()
        assert error <= tolerance * max(gradient.abs().max(), floor), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("tokens", ["response", "non_pad", "all"])
def test_loss_and_gradient_equal_the_formula(family, tokens, batch):
    teacher = make_model(family).eval()
    student = disturbed(teacher).eval()
    alignment = KLAlignment(student, teacher, tokens, chunk_tokens=5)
    loss = alignment(batch)
    wanted = plain_loss(student, teacher, batch, tokens)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert loss.item() > 0.01
    assert_same(gradients(loss, student), gradients(wanted, student), 1e-4)
    again = alignment(batch)  # the head's check ran in the first call only
    assert torch.equal(again, loss)


def test_float64(batch, true_float64):
    teacher = make_model("llama", torch.float64).eval()
    student = disturbed(teacher).eval()
    loss = KLAlignment(student, teacher, chunk_tokens=4)(batch)
    assert loss.dtype == torch.float64
    wanted = plain_loss(student, teacher, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    assert_same(gradients(loss, student), gradients(wanted, student), 1e-10)


def test_bfloat16_error_is_at_most_twice_that_of_the_formula():
    ours, plain = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(5):
        hidden, weight = torch.randn(40, 32).bfloat16(), (torch.randn(500, 32) / 3).bfloat16()
        target = (hidden + 0.3 * torch.randn(40, 32)).bfloat16() @ weight.t()

        def leaves(dtype, hidden=hidden, weight=weight):
            return [t.clone().to(dtype).requires_grad_() for t in (hidden, weight)]

        def formula(h, w, target=target):
            wide = torch.promote_types(h.dtype, torch.float32)
            return reference.kl_divergence((h @ w.t()).to(wide), target.to(wide), wide).sum()

        x64, w64 = leaves(torch.float64)
        exact = formula(x64, w64)
        exact.backward()
        x, w = leaves(torch.bfloat16)
        eager = formula(x, w)
        eager.backward()
        head = nn.Linear(32, 500, bias=False, dtype=torch.bfloat16)
        head.weight.data = weight
        y = hidden.clone().requires_grad_()
        loss = chunked_kl(y, OutputHead(head, None, "test"), lambda b, e, t=target: t[b:e], 16)
        loss.backward()
        for total, a in (
            (ours, (loss, y.grad, head.weight.grad)),
            (plain, (eager, x.grad, w.grad)),
        ):
            for i, (found, want) in enumerate(zip(a, (exact, x64.grad, w64.grad), strict=True)):
                total[i] += (found.detach().double() - want.detach()).square().sum()
    assert torch.all(ours.sqrt() <= 2 * plain.sqrt())


class LargestTensor(TorchDispatchMode):
    """Notes the most elements any operator's result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("frozen_head", [True, False])
def test_memory_does_not_grow_with_tokens_times_vocabulary(frozen_head):
    vocabulary, width, chunk = 3000, 16, 24
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(not frozen_head)
    for tokens in (64, 256):
        hidden = torch.randn(tokens, width, requires_grad=True)
        teacher = torch.randn(tokens, width)
        with LargestTensor() as largest:
            chunked_kl(
                hidden, OutputHead(head, None, "test"), lambda b, e, t=teacher: head(t[b:e]), chunk
            ).backward()
        assert largest.elements == chunk * vocabulary < tokens * vocabulary


def test_a_forward_holds_no_logits_of_all_positions(batch):
    teacher = make_model("llama").eval()
    student = disturbed(teacher)
    alignment = KLAlignment(student, teacher, chunk_tokens=4)
    sizes: list[int] = []
    student.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.numel()))
    alignment(batch).backward()
    alignment(batch).backward()
    assert max(sizes) <= 4 * VOCABULARY


@pytest.mark.parametrize("tokens", ["response", "non_pad"])
def test_padding_changes_nothing(tokens):
    teacher = make_model("llama").eval()
    student = disturbed(teacher).eval()
    alignment = KLAlignment(student, teacher, tokens)
    losses = [alignment(make_batch(s, w)) for s, w in [("right", 12), ("right", 20), ("left", 17)]]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=0)
    found = [gradients(loss, student) for loss in losses]
    assert_same(found[1], found[0], 1e-4)
    assert_same(found[2], found[0], 1e-4)


def test_sums_add_up_over_parts_of_a_batch(batch):
    teacher = make_model("llama").eval()
    student = disturbed(teacher).eval()
    alignment = KLAlignment(student, teacher)
    whole = alignment(batch, normalizer=1)
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
    torch.testing.assert_close(whole, sum(alignment(p, normalizer=1) for p in parts))
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(alignment(batch), whole / tokens)


def test_the_incoming_gradient_scales(batch):
    teacher = make_model("llama").eval()
    student = disturbed(teacher).eval()
    alignment = KLAlignment(student, teacher)
    once, thrice = gradients(alignment(batch), student), gradients(3 * alignment(batch), student)
    assert_same(thrice, {n: 3 * g for n, g in once.items()}, 1e-6)


def test_a_frozen_head_gets_no_gradient(batch):
    teacher = make_model("llama").eval()
    student = disturbed(teacher).eval()
    student.lm_head.requires_grad_(False)
    found = gradients(KLAlignment(student, teacher)(batch), student)
    assert "lm_head.weight" not in found
    assert_same(found, gradients(plain_loss(student, teacher, batch), student), 1e-4)


# ---- references ------------------------------------------------------------------------------
def test_adapter_off_equals_the_model_without_adapters(batch):
    base = make_model("llama").eval()
    plain = copy.deepcopy(base)
    student = lora(base).train()
    alignment = KLAlignment(student)
    torch.manual_seed(5)
    alignment(batch)
    assert all(m.training for m in student.modules())  # the reference's eval mode is undone
    student.eval()
    loss, wanted = alignment(batch), plain_loss(student, plain, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    found = gradients(loss, student)
    assert all("lora" in name for name in found)
    assert_same(found, gradients(wanted, student), 1e-4)


def test_nothing_to_correct_before_training(batch):
    student = lora(make_model("llama"), zero=True).eval()
    loss = KLAlignment(student)(batch)
    assert loss.item() == 0.0
    assert not any(g.any() for g in gradients(loss, student).values())


@pytest.mark.parametrize("zero", [True, False])
def test_adapters_on_the_head_itself(batch, zero):
    base = make_model("llama").eval()
    plain = copy.deepcopy(base)
    student = lora(base, zero, target_modules=["q_proj", "lm_head"]).eval()
    with pytest.warns(UserWarning, match="not a plain linear layer"):
        loss = KLAlignment(student, chunk_tokens=3)(batch)
    wanted = plain_loss(student, plain, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    if not zero:
        found = gradients(loss, student)
        assert any("lm_head" in name for name in found)
        assert_same(found, gradients(wanted, student), 1e-4)


def test_adapter_off_without_adapters():
    with pytest.raises(ValueError, match="needs a model with PEFT adapters, got LlamaForCausalLM"):
        KLAlignment(make_model("llama"))


def test_adapter_off_refuses_parameters_that_would_drift():
    student = lora(make_model("llama"))
    student.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm.weight is not, so training would change"):
        KLAlignment(student)


def test_adapter_off_leaves_frozen_adapters_frozen(batch):
    student = lora(make_model("llama"))
    for name, parameter in student.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    found = gradients(KLAlignment(student)(batch), student)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
    assert found
    assert all("lora_B" in name for name in found)


def test_a_reference_that_is_trained_itself_is_refused(batch):
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"shares trained parameters with the model \(.*change it"):
        KLAlignment(model, model)
    student = lora(model)  # PEFT puts the adapters into the model itself
    with pytest.raises(ValueError, match=r"lora_A.*or a copy loaded separately"):
        KLAlignment(student, student.get_base_model())
    frozen = make_model("llama").requires_grad_(False)
    student = make_model("llama")
    student.lm_head = frozen.lm_head  # shared, but not trained
    assert KLAlignment(student, frozen)(batch).isfinite()


def test_cached_states_equal_the_model_before_training(batch, tmp_path: Path):
    student = make_model("llama").eval()
    student.lm_head.requires_grad_(False)
    teacher = copy.deepcopy(student)
    alignment = KLAlignment(student, "cached")
    assert alignment.cache([make_batch("left", 15)], tmp_path / "states") == 4
    loaded = KLAlignment(student, "cached", cache=tmp_path / "states")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name != "lm_head.weight":
                parameter += 0.05 * torch.randn_like(parameter)
    wanted = plain_loss(student, teacher, batch)
    for one in (alignment, loaded):
        torch.testing.assert_close(one(batch), wanted, rtol=1e-4, atol=1e-6)
    assert_same(gradients(loaded(batch), student), gradients(wanted, student), 1e-3)
    with pytest.raises(StorageError, match="with another model"):
        KLAlignment(student, "cached", cache=tmp_path / "states")
    with torch.no_grad():
        student.lm_head.weight += 1
    with pytest.raises(StorageError, match="with another output head"):
        KLAlignment(student, "cached", cache=tmp_path / "states")


def test_cached_refuses_what_it_does_not_hold(batch):
    student = make_model("llama").eval()
    with pytest.raises(ValueError, match="needs a frozen output head"):
        KLAlignment(student, "cached")
    student.lm_head.requires_grad_(False)
    alignment = KLAlignment(student, "cached")
    alignment.cache([{k: v[:2] for k, v in batch.items()}])
    with pytest.raises(ValueError, match="row 2 of the batch is not among the 2 cached samples"):
        alignment(batch)
    everything = KLAlignment(student, "cached", "all")
    everything.cache([batch])
    with pytest.raises(ValueError, match="padding has no cached states"):
        everything(batch)


# ---- heads -----------------------------------------------------------------------------------
def test_soft_capped_logits(batch):
    teacher = make_model("gemma2", final_logit_softcapping=2.0).eval()
    student = disturbed(teacher).eval()
    alignment = KLAlignment(student, teacher, chunk_tokens=4)
    with pytest.warns(UserWarning, match="soft-capping"):
        loss = alignment(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        alignment(batch)
    wanted = plain_loss(student, teacher, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert_same(gradients(loss, student), gradients(wanted, student), 1e-4)


def test_the_slower_path_can_be_forbidden(batch, monkeypatch):
    monkeypatch.setenv("GRADSAFE_STRICT", "1")
    student = make_model("gemma2", final_logit_softcapping=2.0)
    with pytest.raises(RuntimeError, match="GRADSAFE_STRICT"):
        KLAlignment(student, disturbed(student))(batch)
    plain = make_model("llama")
    KLAlignment(plain, disturbed(plain))(batch)


def test_unknown_transforms_are_refused(batch):
    student = make_model("llama")
    student.lm_head.register_forward_hook(lambda m, args, out: out)
    inner = student.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    student.forward = scaled
    with pytest.raises(RuntimeError, match="not those of its output head"):
        KLAlignment(student, make_model("llama"))(batch)


def test_logits_that_are_not_finite_are_not_blamed_on_the_family(batch):
    student, teacher = make_model("llama"), make_model("llama")
    with torch.no_grad():
        student.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="the model's logits hold NaN or Inf"):
        KLAlignment(student, teacher)(batch)


# ---- wrappers --------------------------------------------------------------------------------
def test_the_hooks_of_ddp_fire(batch, tmp_path: Path):
    base = make_model("llama")
    student = lora(base).eval()
    wanted = gradients(KLAlignment(student)(batch), student)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(student)
        fired: list[int] = []

        def hook(state, bucket):
            fired.append(len(bucket.gradients()))
            future: Any = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, hook)
        found = gradients(KLAlignment(wrapped)(batch), student)
        assert_same(found, wanted, 1e-6)
        assert sum(fired) == len(wanted)
        later = KLAlignment(student)
        assert_same(gradients(later(batch, model=wrapped), student), wanted, 1e-6)
        with pytest.raises(ValueError, match="to wrap the model given at construction"):
            later(batch, model=make_model("llama"))
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_and_no_grad(batch):
    teacher = make_model("llama").eval()
    student = disturbed(teacher).eval()
    alignment = KLAlignment(student, teacher)
    wanted = alignment(batch)
    with torch.no_grad():
        assert torch.equal(alignment(batch), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment(batch)
    torch.testing.assert_close(loss, wanted, rtol=0.1, atol=0)
    found, exact = gradients(loss, student), gradients(wanted, student)
    for name, gradient in exact.items():
        cosine = functional.cosine_similarity(found[name].flatten(), gradient.flatten(), 0)
        assert cosine > 0.97, name


# ---- SFT -------------------------------------------------------------------------------------
def test_sft_is_the_models_own_loss(batch):
    student = make_model("llama").eval()
    loss = SFTAlignment(student, chunk_tokens=5)(batch)
    wanted = student(**batch).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    assert_same(gradients(loss, student), gradients(wanted, student), 1e-4)


# ---- errors ----------------------------------------------------------------------------------
def test_no_response_tokens(batch):
    student = make_model("llama")
    for alignment in (KLAlignment(student, disturbed(student)), SFTAlignment(student)):
        with pytest.raises(ValueError, match="no response token"):
            alignment({**batch, "labels": torch.full_like(batch["labels"], -100)})


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "labels"])
def test_a_missing_part_of_the_batch_is_named(batch, name):
    student = make_model("llama")
    del batch[name]
    with pytest.raises(ValueError, match=f"{name}.*of shape .*got NoneType"):
        KLAlignment(student, disturbed(student))(batch)


BAD_OPTIONS = [
    ({"kl_tokens": "prompt"}, r"kl_tokens to be one of response, non_pad, all, got 'prompt'"),
    ({"reference": "frozen"}, 'reference to be "adapter_off", "cached" or a model.*got \'frozen\''),
    ({"chunk_tokens": 0}, "chunk_tokens >= 1, got 0"),
    ({"cache": "folder"}, 'for reference="cached" only'),
]


@pytest.mark.parametrize(("options", "text"), BAD_OPTIONS)
def test_bad_options_name_the_argument(options, text):
    with pytest.raises(ValueError, match=text):
        KLAlignment(make_model("llama"), **options)

"""The trainer under FSDP2, two processes, is the trainer on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sharded_runs
import torch
from distributed_runs import spawn
from safetensors.torch import load_file
from tiny_run import largest_difference, make_model, weights

from gradsafe.finetuning import KLAlignment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return spawn(sharded_runs.sharded_run, folder, "sharded")


@pytest.mark.parametrize("name", list(sharded_runs.cases()))
def test_sharded_is_unsharded(name: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    model, options, _ = sharded_runs.cases()[name]
    before = weights(model)
    single = sharded_runs.make(tmp_path, model, batch=4, **options)
    single.train()
    assert largest_difference(weights(single.model), before) > 0.05
    for rank in ranks:
        trained, history, pieces = rank[name]
        assert pieces
        assert largest_difference(weights(single.model), trained) < 1e-5
        assert len(history) == sharded_runs.STEPS
        # The first step of a cached or second model starts at a divergence of 0: noise.
        for entry, other in zip(sharded_runs.losses(single)[1:], history[1:], strict=True):
            for key in ("cosine", "user_norm", "align_norm", "kl"):
                key = f"safegrad/{key}"
                assert entry[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5)
    assert largest_difference(ranks[0][name][0], ranks[1][name][0]) == 0


def test_a_resumed_run_is_an_unbroken_one(folder: Path, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert largest_difference(rank["whole"], rank["resumed"]) == 0
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    names = {name: name.replace(".default", "") for name in ranks[0]["resumed"]}
    assert set(adapter) == set(names.values())
    assert all(torch.equal(adapter[names[n]], t) for n, t in ranks[0]["resumed"].items())


def test_the_alignment_loss_in_a_loop_of_your_own(ranks: list[dict[str, Any]]) -> None:
    model = make_model(targets=["q_proj", "lm_head"])
    loss = KLAlignment(model)(sharded_runs.alignment_batch())
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for rank in ranks:
        run = rank["own loop"]
        torch.testing.assert_close(run["loss"], loss.detach())
        assert largest_difference(expected, run["gradients"]) < 1e-6
        assert "the reference model is sharded" in run["refused"][0]


def test_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        refused = rank["refused"]
        assert "would use DDP instead; leave fsdp out" in refused["cpu"]
        assert "FSDP1 is not supported" in refused["version"]
        assert "torch_compile=True does not work with FSDP2" in refused["compile"]

"""One process and two give the same: the trainer under DDP, own loops under DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_runs
import pytest
import torch
from distributed_runs import STEPS, full, loop, make_net, spawn
from tiny_run import largest_difference, make_model, weights

from gradsafe import GradientSurgery


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(distributed_runs.loops_run, tmp_path_factory.mktemp("loops"), "loops")


@pytest.mark.parametrize("name", ["trainer", "sft"])
def test_the_trainer_under_ddp_is_the_trainer_on_one_process(tmp_path: Path, name: str) -> None:
    ranks = spawn(getattr(distributed_runs, f"{name}_run"), tmp_path, name)
    single = distributed_runs.trainer_for(tmp_path / "single", batch=4)
    single.train()
    assert largest_difference(weights(single.model), weights(make_model())) > 0.05
    for trained, history in ranks:
        assert largest_difference(weights(single.model), trained) < 1e-6
        assert len(history) == STEPS
        for entry, other in zip(single.state.log_history, history, strict=False):
            for key in (f"safegrad/{x}" for x in ("cosine", "user_norm", "align_norm", "kl")):
                assert entry[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)
    assert largest_difference(ranks[0][0], ranks[1][0]) == 0


@pytest.mark.parametrize(
    ("name", "scope"),
    [("ddp", "global"), ("fsdp", "global"), ("layer", "layer"), ("mixed", "global")],
)
def test_sharded_is_unsharded(name: str, scope: Any, loops: list[dict[str, Any]]) -> None:
    net = make_net()
    expected = loop(net, GradientSurgery(net.named_parameters(), scope=scope), slice(0, 8))
    assert any(step[0][0] < 0 for step in expected)  # conflicts
    for rank in loops:
        results, trained = rank[name][:2]
        assert torch.allclose(torch.tensor(results), torch.tensor(expected), rtol=1e-4, atol=1e-6)
        assert largest_difference(full(net), trained) < 1e-5
    assert loops[0][name][0] == loops[1][name][0]
    assert largest_difference(loops[0][name][1], loops[1][name][1]) == 0


def test_every_rank_skips_the_step_that_is_not_finite(loops: list[dict[str, Any]]) -> None:
    net = make_net()
    loop(net, GradientSurgery(net.parameters()), slice(0, 8), bad=7)
    for rank in loops:
        _, trained, skipped = rank["bad"]
        assert skipped == 1
        assert largest_difference(full(net), trained) < 1e-5


def test_buckets_that_are_overwritten_are_refused(loops: list[dict[str, Any]]) -> None:
    for rank in loops:
        assert "gradient_as_bucket_view=False" in rank["bucket"]

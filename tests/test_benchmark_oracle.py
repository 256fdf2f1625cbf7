"""A benchmark tells a wrong result from a right one, and says so in its row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import (
    cases_cosine_topk,
    cases_grouped_wgrad_moments,
    cases_kl_divergence,
    cases_moments,
    cases_subspace_surgery,
    cases_surgery,
    oracle,
    run,
)
from benchmarks import cases_wgrad_moments as cases_wgrad
from gradsafe import ops


def off_dots(result: Any, *arguments: Any) -> Any:
    part = result[0] if isinstance(result, tuple) else result
    part.dots[0].mul_(1.01)
    return result


def off_count(result: Any, *arguments: Any) -> Any:
    part = result[-1] if isinstance(result, tuple) else result
    part.count[0].add_(1)
    return result


def off_scores(result: Any, *arguments: Any) -> Any:
    return ops.TopK(result.scores + 1e-4, result.indices)


def off_indices(result: Any, *arguments: Any) -> Any:
    return ops.TopK(result.scores, result.indices[:, [0, *range(result.indices.shape[1] - 1)]])


def off_value(result: Any, *arguments: Any) -> Any:
    return result * 1.001


def off_inputs(result: Any, first: Any, *arguments: Any) -> Any:
    tensor = first[0] if isinstance(first, list) else first
    tensor.data.view(-1)[-1] += 0.1
    return result


WRONG = [
    ("moments", cases_moments, "moments", off_dots),
    ("moments", cases_moments, "moments", off_count),
    ("wgrad_moments", cases_wgrad, "wgrad_moments", off_dots),
    ("wgrad_moments", cases_wgrad, "wgrad_moments", off_count),
    ("grouped_wgrad_moments", cases_grouped_wgrad_moments, "grouped_wgrad_moments", off_dots),
    ("cosine_topk", cases_cosine_topk, "cosine_topk", off_scores),
    ("cosine_topk", cases_cosine_topk, "cosine_topk", off_indices),
    ("kl_divergence", cases_kl_divergence, "kl_divergence_", off_value),
    ("kl_divergence", cases_kl_divergence, "kl_divergence_", off_inputs),
    ("surgery", cases_surgery, "surgery_", off_inputs),
    ("surgery_adamw", cases_surgery, "surgery_adamw_", off_inputs),
    ("subspace_surgery", cases_subspace_surgery, "subspace_surgery_", off_inputs),
]


@pytest.mark.parametrize("name", list(run.OPERATORS))
def test_right_results_are_within_the_bound(name):
    operator = run.OPERATORS[name]
    for case in operator.cases("cpu", dry_run=True):
        assert operator.build(case, "cpu").check() <= 1


@pytest.mark.parametrize(("name", "module", "function", "change"), WRONG)
def test_a_wrong_result_is_beyond_the_bound(name, module, function, change, monkeypatch):
    right = getattr(ops, function)
    monkeypatch.setattr(module, function, lambda *a, **k: change(right(*a, **k), *a))
    operator = run.OPERATORS[name]
    case = operator.cases("cpu", dry_run=True)[0]
    assert operator.build(case, "cpu").check() > 1


def test_not_a_number_is_never_right():
    nan, one = torch.tensor([math.nan]), torch.ones(1)
    assert oracle.share(nan, one, 1.0) == oracle.share(one, nan, 1.0) == math.inf
    assert oracle.share(nan, nan, 1.0) == 0
    assert oracle.share(one / 0, one, 1.0) == math.inf
    assert oracle.share(one / 0, one / 0, 1.0) == 0


def test_a_wrong_row_is_written_and_named(monkeypatch, tmp_path, capsys):
    right = ops.moments
    monkeypatch.setattr(cases_moments, "moments", lambda *a: off_dots(right(*a)))
    options = run.Options("cpu", dry_run=True, compiled=False)
    rows, failed = run.measure("moments", options, tmp_path / "moments_cpu.csv")
    assert len(failed) == len(rows) == len(cases_moments.CPU_CASES)
    assert "WRONG: " in capsys.readouterr().out
    monkeypatch.setattr(cases_moments, "moments", right)
    again, failed = run.measure("moments", options, tmp_path / "moments_cpu.csv", resume=True)
    assert not failed
    assert [r["case"] for r in again] == [r["case"] for r in rows]
    assert all(r["checked"] <= 1 for r in again)

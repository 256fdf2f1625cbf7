"""Gradient surgery and the AdamW step in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.ops.checks import (
    FLOAT_DTYPES,
    are_twins,
    check_apart,
    check_dense,
    check_device,
    check_number,
    check_same_length,
    check_tensor_list,
    check_twin,
    written,
)
from gradsafe.ops.registry import operator
from gradsafe.ops.surgery import check_pairs, check_rho, check_sums, fake_results, no_conflict

OP = "surgery_adamw_"


def surgery_adamw_(
    params: Sequence[Tensor],
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Tensor | Sequence[Tensor],
    *,
    rho: float = 1.0,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    groups: Sequence[int] | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """One AdamW step on the merged gradient of `surgery_`, which is never written.

    Equal to `surgery_(user, align, rho, groups)` followed by `torch.optim.AdamW` on `user`, up to
    rounding: everything between load and store is float32, and the merged gradient of 16-bit
    tensors is not rounded in between. `user` stays as it is. AdamW: arXiv 1711.05101, Algorithm 2,
    with decay by lr * weight_decay, and defaults as in PyTorch.

    If any sum of any group is not finite (see `surgery_`), no parameter takes the step: parameters,
    states and counters stay as they are, and all coefficients of the result are NaN.

    Args:
        params: parameters of any shapes; float32, bfloat16 or float16. Written, also if they
            require gradients. Layouts and devices as for `user` of `surgery_`.
        user: gradients of the user loss, like `params` in shape, strides and dtype.
        align: gradients of the alignment loss, likewise.
        exp_avg: first moments, likewise (as in PyTorch, states have the parameter's dtype).
            Written.
        exp_avg_sq: second moments, likewise. Written.
        step: steps taken so far, float32 with one element on the device of the parameters: one
            for each parameter, as PyTorch's fused AdamW keeps them, or a single one for all. Whole
            numbers. Advanced by 1.
        rho: weight of the alignment gradient, as in `surgery_`.
        lr: learning rate, a number. A captured CUDA graph keeps the one of its capture.
        betas: decay rates of the moments, each at least 0 and below 1.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        groups: conflict tests, as in `surgery_`.
        sums: of `surgery_sums`, added up over ranks, for sharded gradients; then they are not
            computed here, and the gradients are read once.

    Returns:
        As `surgery_`.

    Raises:
        TypeError, ValueError, RuntimeError: as `surgery_`; also for options out of range.
    """
    steps = _check(params, user, align, exp_avg, exp_avg_sq, step)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check_number(OP, name, value)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        refuse(OP, "betas to be a pair of numbers", repr(betas), kind=TypeError)
    for index, beta in enumerate(betas):
        check_number(OP, f"betas[{index}]", beta, below=1)
    check_rho(OP, rho)
    table = None if sums is None else check_sums(OP, sums, groups)
    numbers, count = check_pairs(OP, user, align, groups, None if table is None else len(table))
    if not params:
        out = no_conflict(count, rho)
    else:
        lists = [list(tensors) for tensors in (params, user, align, exp_avg, exp_avg_sq)]
        if sums is not None and table is not None:
            check_device(OP, "sums", sums, "params[0]", params[0])
            for tensor in (*params, *exp_avg, *exp_avg_sq, *steps):
                check_apart(OP, "a tensor that is written", tensor, "sums", table)
        options = [float(value) for value in (rho, lr, *betas, eps, weight_decay)]
        with torch.no_grad():
            out = torch.ops.gradsafe.surgery_adamw_(*lists, steps, table, *options, numbers, count)
        written([*params, *exp_avg, *exp_avg_sq, *steps])
    return out[0] if groups is None else out


def _check(
    params: Sequence[Tensor],
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Tensor | Sequence[Tensor],
) -> list[Tensor]:
    """All lists but `align`, which `check_pairs` compares with `user`; returns the counters."""
    if not are_twins(FLOAT_DTYPES, params, user, align, exp_avg, exp_avg_sq):
        _check_one_by_one(params, user, align, exp_avg, exp_avg_sq)
    steps = [step] if isinstance(step, Tensor) else step
    check_tensor_list(OP, "step", steps)
    if not isinstance(step, Tensor) and len(steps) != len(params):
        expected = f"one step counter for each of {len(params)} parameters (or a single tensor)"
        refuse(OP, expected, len(steps))
    for index, counter in enumerate(steps):
        name = "step" if isinstance(step, Tensor) else f"step[{index}]"
        check_dense(OP, name, counter, (torch.float32,))
        if counter.numel() != 1:
            refuse(OP, f"{name} with one element", f"shape {list(counter.shape)}")
        if params:
            check_device(OP, name, counter, "params[0]", params[0])
    return list(steps)


def _check_one_by_one(
    params: Sequence[Tensor],
    user: Sequence[Tensor],
    align: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
) -> None:
    """Raises where an argument does not fit."""
    check_tensor_list(OP, "params", params)
    lists = {"user": user, "align": align, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensors in lists.items():
        check_tensor_list(OP, name, tensors)
        check_same_length(OP, name, tensors, "params", len(params))
        if name != "align":
            for index, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
                check_twin(OP, f"{name}[{index}]", tensor, f"params[{index}]", param)


operator(
    "surgery_adamw_(Tensor(a!)[] params, Tensor[] user, Tensor[] align, Tensor(b!)[] exp_avg, "
    "Tensor(c!)[] exp_avg_sq, Tensor(d!)[] steps, Tensor? sums, float rho, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int[] groups, int num_groups) "
    "-> Tensor"
)(fake_results)

"""Gradient surgery for your own training loop, in the style of `torch.optim`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gradsafe._checks import check_value, refuse
from gradsafe.finetuning import shards
from gradsafe.finetuning.config import Scope
from gradsafe.finetuning.statistics import RunningStatistics, SurgeryStatistics
from gradsafe.ops.checks import FLOAT_DTYPES
from gradsafe.ops.surgery import check_rho

OnNonfinite = Literal["drop", "poison"]


class GradientSurgery:
    """Merges the gradients of a user loss and an alignment loss (SafeGrad, arXiv 2508.07172).

        user_loss.backward();  surgery.stash()    # once per optimizer step, after all backwards
        align_loss.backward(); surgery.merge()    # .grad now holds the merged gradient
        optimizer.step()

    `stash` takes the user gradients out of `.grad` without a copy; `merge` writes the merged
    gradient into the same buffers (formula: `gradsafe.ops.surgery_`). Both losses may be
    accumulated over several backward passes. Clip gradients after `merge`.

    A parameter without a user gradient is treated as having a zero user gradient: it gets the
    alignment gradient times the coefficient (rho if there is no conflict). A parameter without an
    alignment gradient keeps its user gradient. Without either, `.grad` stays None.

    Distributed training: call both methods on every rank, after the gradients were reduced. Under
    DistributedDataParallel, keep the default `gradient_as_bucket_view=False` (the next backward
    pass overwrites buckets). DTensor gradients (FSDP2, tensor parallelism) are merged shard by
    shard, with one all-reduce of three scalars per test.

    Loss scaling: scale both losses by the same factor. It also scales the merged gradient and the
    norms in the statistics, but not the cosine and the coefficient.

    Args:
        parameters: Parameters, pairs (name, parameter) such as `model.named_parameters()`, or the
            `param_groups` of an optimizer. Parameters that do not require a gradient are ignored.
            float32, bfloat16 or float16, on any devices.
        rho: Weight of the alignment gradient, finite and >= 0.
        scope: What one conflict test covers: "global" all parameters (the paper), "tensor" each
            parameter, or "layer" the parameters with the same name up to the first number (needs
            names; parameters without a number in their name form one layer).
        projection: False is the ablation without projection, the weighted sum of both gradients.
        on_nonfinite: What to do if a sum of squares is NaN or Inf. "drop": set all `.grad` to None,
            so that `optimizer.step()` changes neither parameters nor state; synchronises with the
            device once per merge. "poison": set the first element of every gradient to NaN, so that
            a `torch.amp.GradScaler` skips the step and lowers its scale; does not synchronise.
            **Without a scaler, "poison" destroys the parameters.**

    Attributes:
        results: float64 `[G, 4]` of the last merge, on the device: dot, sq_user, sq_align and
            coefficient of each of G tests. None before the first merge.

    Raises:
        ValueError: An option is out of range, no parameter requires a gradient, a parameter is
            listed twice, or scope="layer" without names.
        TypeError: An item is not a parameter, or has another dtype.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        rho: float = 1.0,
        scope: Scope = "global",
        *,
        projection: bool = True,
        on_nonfinite: OnNonfinite = "drop",
    ) -> None:
        check_rho("GradientSurgery", rho)
        check_value("GradientSurgery", "scope", scope, Scope)
        check_value("GradientSurgery", "on_nonfinite", on_nonfinite, OnNonfinite)
        named = _trained(parameters)
        self.parameters = [parameter for _, parameter in named]
        self.rho = rho
        self.scope: Scope = scope
        self.projection = projection
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.results: Tensor | None = None
        self._tests = _test_keys([name for name, _ in named], scope)
        self._stash: list[Tensor | None] | None = None
        self._running = RunningStatistics()

    @torch.no_grad()
    def stash(self) -> None:
        """Takes the user gradients aside; every `.grad` is None afterwards.

        Raises:
            RuntimeError: There is a stash already, or no parameter has a gradient.
            TypeError: A gradient is sparse.
        """
        if self._stash is not None:
            raise RuntimeError(
                "gradsafe.GradientSurgery: stash() was called twice; call merge() in between, and "
                "stash() only once per optimizer step, after the last user_loss.backward()"
            )
        self._stash = self._take("stash", "user_loss")

    @torch.no_grad()
    def merge(self) -> Tensor:
        """Merges the alignment gradients in `.grad` into the stashed user gradients.

        Returns:
            `results`.

        Raises:
            RuntimeError: Nothing was stashed, or no parameter has an alignment gradient.
            ValueError: The two gradients of a parameter differ in layout or share memory.
            TypeError: A gradient is sparse.
        """
        if self._stash is None:
            raise RuntimeError(
                "gradsafe.GradientSurgery: merge() without stash(); call user_loss.backward(), "
                "stash(), align_loss.backward() and merge(), in this order"
            )
        aligned = self._take("merge", "align_loss")
        pairs = list(zip(self._stash, aligned, strict=True))
        self._stash = None
        used = [i for i, (u, a) in enumerate(pairs) if u is not None or a is not None]
        user, align = zip(*(_filled(i, *pairs[i]) for i in used), strict=True)
        # Renumbered, so that no test is empty: a layer without gradients has none.
        number = {key: row for row, key in enumerate(sorted({self._tests[i] for i in used}))}
        parts = shards.split(user, align, [number[self._tests[i]] for i in used])
        self.results = shards.merge(parts, len(number), self.rho, self.projection)
        self._running.add(self.results)
        if self.on_nonfinite == "poison":
            _poison(parts, self.results)
        elif not bool(self.results[:, 3].isfinite().all()):
            return self.results
        for index, gradient in zip(used, user, strict=True):
            self.parameters[index].grad = gradient
        return self.results

    def discard(self) -> None:
        """Drops the stash, for example after an error in the alignment loss."""
        self._stash = None

    @property
    def skipped(self) -> int:
        """Number of non-finite steps since construction; synchronises with the device."""
        return self._running.skipped

    def statistics(self) -> SurgeryStatistics:
        """Return the statistics since the last reset; synchronises with the device."""
        return self._running.read()

    def reset_statistics(self) -> None:
        """Resets the statistics, but not `skipped`."""
        self._running.reset()

    def _take(self, method: str, loss: str) -> list[Tensor | None]:
        gradients = [parameter.grad for parameter in self.parameters]
        if all(gradient is None for gradient in gradients):
            raise RuntimeError(
                f"gradsafe.GradientSurgery: {method}() found no gradient in any parameter; call "
                f"{loss}.backward() first, and pass the parameters that are trained"
            )
        for index, gradient in enumerate(gradients):
            if gradient is not None and gradient.layout is not torch.strided:
                expected = f"the gradient of parameter {index} {list(gradient.shape)} to be dense"
                do = "use sparse=False in the embedding"
                refuse("GradientSurgery", expected, gradient.layout, do, TypeError)
        for parameter in self.parameters:
            parameter.grad = None
        return gradients


def _filled(index: int, user: Tensor | None, align: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both gradients of a parameter, zeros for a missing one."""
    if user is None:
        assert align is not None
        return torch.zeros_like(align), align
    if align is None:
        return user, torch.zeros_like(user)
    storages = [
        shards.local("gradient", gradient)[0].untyped_storage() for gradient in (user, align)
    ]
    if storages[0].data_ptr() == storages[1].data_ptr() != 0:  # empty shards have no memory
        raise ValueError(
            f"gradsafe.GradientSurgery: the alignment gradient of parameter {index} overwrote its "
            "user gradient; use DistributedDataParallel with gradient_as_bucket_view=False"
        )
    return user, align


def _poison(parts: list[shards.Part], results: Tensor) -> None:
    """Adds 0 to the first element of each tensor if all coefficients are finite, else NaN."""
    nothing = (results[:, 3] * 0).sum()
    for part in parts:
        first = [u.as_strided((1,), (1,)) for u in part.user if u.numel()]
        if first:
            torch._foreach_add_(first, nothing.to(first[0].device))


def _test_keys(names: list[str | None], scope: Scope) -> list[int]:
    """Return the number of the conflict test of each parameter."""
    if scope == "global":
        return [0] * len(names)
    if scope == "tensor":
        return list(range(len(names)))
    numbers: dict[str, int] = {}
    return [numbers.setdefault(_layer(name), len(numbers)) for name in names]


def _layer(name: str | None) -> str:
    if name is None:
        raise ValueError(
            'gradsafe.GradientSurgery: scope="layer" needs names; pass model.named_parameters()'
        )
    path = name.split(".")
    ends = [place + 1 for place, piece in enumerate(path) if piece.isdigit()]
    return ".".join(path[: ends[0]]) if ends else ""


def _trained(parameters: Iterable[Any]) -> list[tuple[str | None, Tensor]]:
    """Return the parameters that require a gradient, with their names if given."""
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        got, do = type(parameters).__name__, "put a single parameter into a list"
        refuse("GradientSurgery", "parameters to be an iterable", got, do, TypeError)
    named: list[tuple[str | None, Tensor]] = []
    for item in parameters:
        match item:
            case {"params": group}:
                named += zip(item.get("param_names", [None] * len(group)), group, strict=True)
            case Mapping():
                expected, keys = "a parameter group to have params", sorted(map(str, item))
                refuse("GradientSurgery", expected, keys, kind=TypeError)
            case (str() | None, _):
                named.append(item)
            case tuple():
                expected = f"parameters[{len(named)}] to be a parameter or (name, parameter)"
                got = f"a tuple of {[type(part).__name__ for part in item]}"
                refuse("GradientSurgery", expected, got, kind=TypeError)
            case _:
                named.append((None, item))
    seen: set[int] = set()
    for index, (_, parameter) in enumerate(named):
        if not isinstance(parameter, Tensor):
            got = type(parameter).__name__
            refuse("GradientSurgery", f"parameters[{index}] to be a tensor", got, kind=TypeError)
        if id(parameter) in seen:
            raise ValueError(f"gradsafe.GradientSurgery: parameters[{index}] is listed twice")
        seen.add(id(parameter))
        if parameter.requires_grad and parameter.dtype not in FLOAT_DTYPES:
            expected = f"parameters[{index}] of dtype float32, bfloat16 or float16"
            refuse("GradientSurgery", expected, parameter.dtype, kind=TypeError)
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"gradsafe.GradientSurgery: none of the {len(named)} parameters requires a gradient; "
            "unfreeze the parameters to train, or add adapters"
        )
    return trained

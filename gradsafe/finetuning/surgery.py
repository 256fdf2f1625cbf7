"""Gradient surgery for a training loop of your own, in the manner of `torch.optim`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gradsafe.finetuning import shards
from gradsafe.finetuning.statistics import RunningStatistics, SurgeryStatistics
from gradsafe.ops.checks import FLOAT_DTYPES
from gradsafe.ops.surgery import RESULTS, check_rho

Scope = Literal["global", "tensor", "layer"]
OnNonfinite = Literal["drop", "poison"]


class GradientSurgery:
    """Merges the gradients of a user loss and an alignment loss (SafeGrad, arXiv 2508.07172).

        user_loss.backward();  surgery.stash()    # once per optimizer step, after all backwards
        align_loss.backward(); surgery.merge()    # .grad now holds the merged gradient
        optimizer.step()

    `stash` moves the user gradients aside by taking `.grad` away: no copy. `merge` writes the
    merged gradient into those same buffers (see `gradsafe.ops.surgery_` for the formula) and gives
    them back as `.grad`; the alignment gradients are released. Both losses may be accumulated over
    several backwards before. Clip after `merge`.

    A parameter without a user gradient counts as zeros: it gets the alignment gradient times the
    coefficient (rho without a conflict). One without an alignment gradient keeps its user gradient.
    One without either keeps None.

    Distributed: call both methods on every rank, after the gradients were reduced. Under
    DistributedDataParallel nothing else is needed (with `gradient_as_bucket_view=False`, its
    default: buckets are overwritten by the next backward). Gradients that are DTensors (FSDP2,
    tensor parallelism) are merged shard by shard; per test three scalars are all-reduced.

    Loss scaling: scale both losses by the same factor. The merged gradient is then scaled by it,
    and so are the norms of the statistics; cosine and coefficient do not change.

    Args:
        parameters: Parameters, pairs (name, parameter) as of `model.named_parameters()`, or an
            optimizer's `param_groups`. Those that do not require a gradient are left out. float32,
            bfloat16 or float16, of any devices.
        rho: Weight of the alignment gradient, finite and not negative.
        scope: What one conflict test covers: "global" all parameters (the paper), "tensor" each on
            its own, or "layer" those that share the path to the first number in their name (needs
            names; parameters outside of numbered blocks are one layer).
        projection: False is the ablation without projection, the weighted sum of both gradients.
        on_nonfinite: What happens if a sum of squares is NaN or Inf. "drop": all `.grad` become
            None, so `optimizer.step()` changes nothing, not even its state or by weight decay; the
            host waits for the device once per merge. "poison": nothing waits, and the first element
            of every gradient becomes NaN, so a `torch.amp.GradScaler` skips the step and lowers its
            scale; **without a scaler it ruins the parameters**.

    Attributes:
        results: float64 `[G, 4]` of the last merge on the device: dot, sq_user, sq_align and
            coefficient of each of G tests; None before the first.

    Raises:
        ValueError: rho, scope or on_nonfinite out of range, no parameter requires a gradient, one
            is there twice, or scope="layer" without names.
        TypeError: Something is no parameter, or of another dtype.
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
        _check_choice("scope", scope, Scope)
        _check_choice("on_nonfinite", on_nonfinite, OnNonfinite)
        named = _named(parameters)
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
        """Moves the user gradients aside; every `.grad` is None afterwards.

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
        tests, count = _dense([self._tests[i] for i in used])
        parts = shards.split(user, align, tests)
        self.results = shards.merge(parts, count, self.rho, self.projection)
        self._running.add(self.results)
        if self.on_nonfinite == "drop":
            if not bool(self.results[:, 3].isfinite().all()):
                return self.results
        else:
            _poison(parts, self.results)
        for index, gradient in zip(used, user, strict=True):
            self.parameters[index].grad = gradient
        return self.results

    def discard(self) -> None:
        """Forgets a stash, for example after an error in the alignment loss."""
        self._stash = None

    @property
    def skipped(self) -> int:
        """Steps that were not finite since construction; waits for the device."""
        return self._running.skipped

    def statistics(self) -> SurgeryStatistics:
        """Reads the statistics since the last reset; waits for the device."""
        return self._running.read()

    def reset_statistics(self) -> None:
        """Starts the statistics anew; `skipped` goes on counting."""
        self._running.reset()

    def _take(self, method: str, loss: str) -> list[Tensor | None]:
        gradients = [parameter.grad for parameter in self.parameters]
        if all(gradient is None for gradient in gradients):
            raise RuntimeError(
                f"gradsafe.GradientSurgery: {method}() found no gradient in any parameter; call "
                f"{loss}.backward() first, and give the surgery the parameters that are trained"
            )
        for index, gradient in enumerate(gradients):
            if gradient is not None and gradient.layout is not torch.strided:
                raise TypeError(
                    f"gradsafe.GradientSurgery: expected the gradient of parameter {index} "
                    f"{list(gradient.shape)} to be dense, got {gradient.layout}; an embedding "
                    "needs sparse=False"
                )
        for parameter in self.parameters:
            parameter.grad = None
        return gradients


def _filled(index: int, user: Tensor | None, align: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both gradients of a parameter; zeros for one that is missing."""
    if user is None:
        assert align is not None
        return torch.zeros_like(align), align
    if align is None:
        return user, torch.zeros_like(user)
    if _storage(user) == _storage(align):
        raise ValueError(
            f"gradsafe.GradientSurgery: the alignment gradient of parameter {index} was written "
            "over its user gradient; use DistributedDataParallel with gradient_as_bucket_view=False"
        )
    return user, align


def _storage(gradient: Tensor) -> int:
    # An empty shard has no memory: 0 must not look like another 0.
    tensor, _ = shards.local("gradient", gradient)
    return tensor.untyped_storage().data_ptr() or id(gradient)


def _poison(parts: list[shards.Part], results: Tensor) -> None:
    """Adds 0 where all coefficients are finite, else NaN, to the first element of each tensor."""
    nothing = (results[:, RESULTS.index("coefficient")] * 0).sum()
    for part in parts:
        first = [u.as_strided((1,), (1,)) for u in part.user if u.numel()]
        if first:
            torch._foreach_add_(first, nothing.to(first[0].device))


def _dense(keys: list[int]) -> tuple[list[int], int]:
    """Renumbers tests so that none is empty (a layer without gradients has no test)."""
    place = {key: number for number, key in enumerate(sorted(set(keys)))}
    return [place[key] for key in keys], len(place)


def _test_keys(names: list[str | None], scope: Scope) -> list[int]:
    if scope == "global":
        return [0] * len(names)
    if scope == "tensor":
        return list(range(len(names)))
    keys: dict[str, int] = {}
    return [keys.setdefault(_layer(name), len(keys)) for name in names]


def _layer(name: str | None) -> str:
    if name is None:
        raise ValueError(
            'gradsafe.GradientSurgery: scope="layer" needs names; pass model.named_parameters()'
        )
    path = name.split(".")
    numbers = [place for place, piece in enumerate(path) if piece.isdigit()]
    return ".".join(path[: numbers[0] + 1]) if numbers else ""


def _named(parameters: Iterable[Any]) -> list[tuple[str | None, Tensor]]:
    """Parameters that require a gradient, with their names if they have any."""
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            "gradsafe.GradientSurgery: expected parameters to be an iterable, got "
            f"{type(parameters).__name__}; put a single one into a list"
        )
    named: list[tuple[str | None, Tensor]] = []
    for item in parameters:
        if isinstance(item, Mapping):
            if "params" not in item:
                raise TypeError(
                    "gradsafe.GradientSurgery: expected a parameter group to have params, got "
                    f"{sorted(map(str, item))}"
                )
            group = item["params"]
            names = item.get("param_names", [None] * len(group))
            named += zip(names, group, strict=True)
        else:
            pair = item if isinstance(item, tuple) else (None, item)
            if len(pair) != 2 or not isinstance(pair[0], (str, type(None))):
                raise TypeError(
                    f"gradsafe.GradientSurgery: expected parameters[{len(named)}] to be a "
                    "parameter or (name, parameter), got a tuple of "
                    f"{[type(part).__name__ for part in pair]}"
                )
            named.append(pair)
    seen: set[int] = set()
    for index, (_, parameter) in enumerate(named):
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"gradsafe.GradientSurgery: expected parameters[{index}] to be a tensor, got "
                f"{type(parameter).__name__}"
            )
        if id(parameter) in seen:
            raise ValueError(f"gradsafe.GradientSurgery: parameters[{index}] is there twice")
        seen.add(id(parameter))
        if parameter.requires_grad and parameter.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"gradsafe.GradientSurgery: expected parameters[{index}] of dtype float32, "
                f"bfloat16 or float16, got {parameter.dtype}"
            )
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"gradsafe.GradientSurgery: none of the {len(named)} parameters requires a gradient; "
            "unfreeze what is to be trained, or add adapters"
        )
    return trained


def _check_choice(name: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise ValueError(
            f"gradsafe.GradientSurgery: expected {name} in {list(get_args(kind))}, got {value!r}"
        )

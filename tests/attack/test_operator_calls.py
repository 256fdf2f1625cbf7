"""Generated operator calls: valid ones against float64, wrong ones must be refused by name.

`GRADSAFE_ATTACK_CALLS=10000` sets the number of calls of each kind; run as a script, this file goes
on with new seeds for some minutes and prints counts.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from gradsafe import ops
from gradsafe.ops import _default as reference

CALLS = int(os.environ.get("GRADSAFE_ATTACK_CALLS", "500"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = 2.0**-24
SIZES = (0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 97, 130, 257)
REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)
Check = Callable[[Any], None]


@dataclass
class Call:
    """A valid call, and the check of its result."""

    name: str
    args: dict[str, Any]
    check: Check
    written: tuple[str, ...] = ()
    options: set[str] = field(default_factory=set)  # arguments that may be None

    def run(self) -> Any:
        return getattr(ops, self.name)(**self.args)


class Maker:
    """Seeded choices: shapes, dtypes, layouts and values."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def size(self, least: int = 0) -> int:
        return max(least, self.random.choice(SIZES))

    def dtype(self) -> torch.dtype:
        return self.random.choice(DTYPES)

    def values(self, shape: tuple[int, ...], strange: float, scale: float = 1.0) -> Tensor:
        kind = self.random.random()
        made = torch.randn(shape) * self.random.choice((scale, scale, scale * 8, scale / 64))
        if kind < 0.05:
            made.zero_()
        elif kind < 0.05 + strange and made.numel():
            for _ in range(self.random.randint(1, 3)):
                at = self.random.randrange(made.numel())
                made.view(-1)[at] = self.random.choice((math.nan, math.inf, -math.inf))
        return made

    def lay_out(self, tensor: Tensor, dtype: torch.dtype, repeat: bool = False) -> Tensor:
        """Rows with gaps, from an odd address on, or one row repeated."""
        kind = self.random.random()
        rows, cols = (math.prod(tensor.shape[:-1]), tensor.shape[-1])
        if repeat and kind < 0.05 and rows and tensor.dim() == 2:
            return tensor[:1].to(dtype).expand(tensor.shape)
        gap, offset = (self.random.choice((0, 0, 1, 5)) for _ in range(2))
        buffer = torch.full((offset + rows * (cols + gap),), 7.0).to(dtype)
        laid = buffer[offset:].view(rows, cols + gap)[:, :cols] if buffer.numel() else buffer
        if not tensor.numel():
            return tensor.to(dtype)
        laid.copy_(tensor.reshape(rows, cols))
        return laid.view(tensor.shape) if tensor.dim() != 2 else laid

    def matrix(self, shape: tuple[int, ...], dtype: torch.dtype, strange: float = 0.15) -> Tensor:
        return self.lay_out(self.values(shape, strange), dtype, repeat=True)

    def refs(self, shape: tuple[int, ...], count: int, segments: list[Tensor]) -> list[Tensor]:
        """References; all finite if some gradient is 0 and so never meets them."""
        dtype = self.random.choice((*DTYPES, torch.float8_e4m3fn))
        finite = dtype is torch.float8_e4m3fn or not all(bool(dy.any()) for dy in segments)
        strange = 0.0 if finite else 0.2
        return [self.lay_out(self.values(shape, strange), dtype) for _ in range(count)]

    def options(self) -> dict[str, Any]:
        return {"axis": self.random.choice(ops.AXES), "unsigned": self.random.random() < 0.5}


def near(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """Within a bound where the definition is finite, and the same infinity or NaN elsewhere."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.double(), want.double()
    finite = want.isfinite()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    bound = torch.as_tensor(bound).broadcast_to(want.shape)
    # A bound that is not finite belongs to a slice whose terms are not, and so is its result.
    error = (got - want).abs()[finite]
    assert torch.all(error <= bound.nan_to_num(posinf=0)[finite]), float(error.max())


def bits(value: Any) -> Any:
    """The bytes of all tensors in an argument, to compare before and after."""
    if isinstance(value, Tensor):
        whole = value.detach().contiguous().view(-1)
        return whole.view(torch.uint8).tolist() if value.numel() else []
    return [bits(item) for item in value] if isinstance(value, (list, tuple)) else value


def near_moments(found: Any, want: Any, scale: Any, ulps: float) -> None:
    triples = zip(*(r if isinstance(r, tuple) else (r,) for r in (found, want, scale)), strict=True)
    for parts in triples:
        for name in ("count", "sum", "sum_sq", "dots"):
            for got, exact, size in zip(*(getattr(part, name) for part in parts), strict=True):
                near(got, exact, ulps * UNIT * size + 1e-300)


def moments(make: Maker) -> Call:
    count, own = make.random.randint(0, 4), make.random.randint(0, 3)
    dtype, shapes = make.dtype(), [(make.size(), make.size()) for _ in range(own)]
    grads = [make.matrix(shape, dtype) for shape in shapes]
    kind = make.random.choice((*DTYPES, torch.float8_e4m3fn))
    refs = [[make.lay_out(make.values(s, 0.0), kind) for _ in range(count)] for s in shapes]
    args = {"grads": grads, "refs": refs, **make.options()}

    def check(found: Any) -> None:
        sizes = [[r.float().abs() for r in group] for group in refs]
        scale = reference.moments([g.abs() for g in grads], sizes, args["axis"])
        near_moments(found, reference.moments(**args), scale, 8)

    return Call("moments", args, check, options={"refs"})


def wgrad_moments(make: Maker) -> Call:
    samples, tokens = make.random.randint(1, 3), make.random.choice((0, 1, 5, 12, 13, 40))
    rows, cols, dtype = make.size(), make.size(), make.dtype()
    x, dy = (make.matrix((samples, tokens, n), dtype, 0.1) for n in (cols, rows))
    lengths = [make.random.randint(0, tokens) for _ in range(samples)]
    used = [dy[b, :length] for b, length in enumerate(lengths)]
    refs = make.refs((rows, cols), make.random.randint(0, 4), used)
    args = {"x": x, "dy": dy, "refs": refs, "lengths": lengths, **make.options()}
    return Call("wgrad_moments", args, products(reference.wgrad_moments, args), options={"lengths"})


def grouped_wgrad_moments(make: Maker) -> Call:
    lengths = [make.random.choice((0, 1, 5, 12, 13, 30)) for _ in range(make.random.randint(1, 4))]
    rows, cols, dtype = make.size(), make.size(), make.dtype()
    x, dy = (make.matrix((sum(lengths), n), dtype, 0.1) for n in (cols, rows))
    matrices = make.random.randint(1, 3)
    refs = make.refs((matrices, rows, cols), make.random.randint(0, 4), list(dy.split(lengths)))
    experts = [make.random.randrange(matrices) for _ in lengths]
    args = {"x": x, "dy": dy, "refs": refs, "lengths": lengths, "experts": experts}
    args |= make.options()
    return Call("grouped_wgrad_moments", args, products(reference.grouped_wgrad_moments, args))


def products(definition: Callable[..., Any], args: dict[str, Any]) -> Check:
    def check(found: Any) -> None:
        sizes = {name: args[name].abs() for name in ("x", "dy")}
        sizes["refs"] = [ref.float().abs() for ref in args["refs"]]
        ulps = 8 + max(args["lengths"], default=0) ** 0.5
        near_moments(found, definition(**args), definition(**{**args, **sizes}), ulps)

    return check


def cosine_topk(make: Maker) -> Call:
    features, k_limit = make.size(), make.size()
    queries = make.matrix((make.size(), features), make.dtype())
    rows = make.matrix((k_limit, features), make.dtype())
    k, start = make.random.randint(0, len(rows)), make.random.choice((0, 5, 2**40))
    args = {"queries": queries, "rows": rows, "k": k, "start": start}

    def check(found: Any) -> None:
        q, r = queries.double(), rows.double()
        norms = q.norm(dim=1)[:, None] * r.norm(dim=1)
        norms = norms.masked_fill(norms == 0, 1)
        exact, scale = q @ r.T / norms, q.abs() @ r.abs().T / norms
        damaged = ~q.isfinite().all(1)[:, None] | ~r.isfinite().all(1)
        exact = exact.masked_fill(damaged, math.nan)
        bound = (4 + min(features, 256) ** 0.5) * UNIT * scale.masked_fill(damaged, 0) + UNIT
        places = found.indices - start
        near(found.scores, exact.gather(1, places), bound.gather(1, places))
        want = reference.cosine_topk(**args).scores
        near(found.scores, want, bound.amax(1, keepdim=True) if len(rows) else 0.0)
        assert all(len(set(row)) == k for row in places.tolist())

    return Call("cosine_topk", args, check)


def merge_topk(make: Maker) -> Call:
    queries, features = make.size(), make.size(1)
    whole = make.matrix((make.size(2), features), torch.float32)
    asked, cut = make.matrix((queries, features), torch.float32), make.random.randint(0, len(whole))
    k = make.random.randint(0, len(whole))
    parts = [
        ops.cosine_topk(asked, rows, min(k, len(rows)), start)
        for rows, start in ((whole[cut:], cut), (whole[:cut], 0))
    ]

    def check(found: Any) -> None:
        for got, want in zip(found, ops.cosine_topk(asked, whole, k), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)

    return Call("merge_topk", {"parts": parts, "k": k}, check)


def logits(make: Maker) -> tuple[Tensor, Tensor]:
    shape = (make.random.choice((0, 1, 3, 9)), make.random.choice((1, 2, 17, 130, 1025, 2061)))
    scale = make.random.choice((0.0, 0.1, 3.0))
    student = make.values(shape, 0.2, scale) + make.random.choice((0.0, -500.0, 300.0))
    teacher = make.values(shape, 0.2, scale)
    if make.random.random() < 0.3:
        teacher = student + torch.randn(shape)
    return make.lay_out(student, make.dtype()), make.lay_out(teacher, make.dtype(), repeat=True)


def below_largest(logits: Tensor) -> Tensor:
    return logits.double() - logits.double().amax(1, keepdim=True)


def near_value(found: Tensor, student: Tensor, teacher: Tensor) -> None:
    apart = (below_largest(teacher) - below_largest(student)).abs()
    spread = apart.nan_to_num(0, posinf=0).amax(1) + 1
    # Where the student excludes a token, only a probability that underflows in float32 is harmless.
    gone = (student == -math.inf) & (teacher < teacher.amax(1, keepdim=True) - 87)
    wanted = reference.kl_divergence(student, teacher.masked_fill(gone, -math.inf))
    near(found, wanted, 8 * UNIT * spread)


def kl_divergence(make: Maker) -> Call:
    student, teacher = logits(make)
    args = {"student_logits": student, "teacher_logits": teacher}
    return Call("kl_divergence", args, lambda found: near_value(found, student, teacher))


def kl_divergence_(make: Maker) -> Call:
    student, teacher = logits(make)
    weight = torch.rand(len(student)) * (torch.rand(len(student)) > 0.2)
    args = {"student_logits": student, "teacher_logits": teacher, "weight": weight}
    before = student.clone()

    def check(found: Tensor) -> None:
        near_value(found, before, teacher)
        exact = before.double()
        reference.kl_divergence_(exact, teacher, weight)
        shares = [t.double() for t in (before, teacher)]
        away = [(t.amax(1, keepdim=True) - t).nan_to_num(200, posinf=200) for t in shares]
        moved = sum(
            t.softmax(1).nan_to_num(0) * (a.clamp(0, 200) + 8)
            for t, a in zip(shares, away, strict=True)
        )
        bound = UNIT * weight.double()[:, None] * moved
        kind = torch.finfo(student.dtype)
        smallest = max(kind.smallest_normal * kind.eps, 1e-37)  # what float32 or float16 lose
        near(student, exact, bound + kind.eps * exact.abs() + smallest)

    return Call("kl_divergence_", args, check, ("student_logits",))


def lists(make: Maker, count: int, strange: float = 0.1) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists of twins; a pair has one layout, which may be a transposed one."""
    dtype, user, align = make.dtype(), [], []
    for _ in range(count):
        shape = tuple(make.size() for _ in range(make.random.randint(0, 3)))
        shape = shape if math.prod(shape) < 40_000 else shape[:2]
        u = make.values(shape, strange).to(dtype)
        a = (make.values(shape, strange) - u.float() * make.random.choice((-1, 0, 1))).to(dtype)
        if make.random.random() < 0.3:
            u, a = u.T if u.dim() == 2 else u, a.T if a.dim() == 2 else a
        user.append(u)
        align.append(a)
    return user, align


def grouping(make: Maker, count: int) -> list[int] | None:
    if make.random.random() < 0.4 or not count:
        return None
    tests = make.random.randint(1, count)
    numbers = [*range(tests), *(make.random.randrange(tests) for _ in range(count - tests))]
    make.random.shuffle(numbers)
    return numbers


def near_sums(found: Tensor, user: list[Tensor], align: list[Tensor], groups: Any) -> None:
    want = reference.surgery_sums(user, align, groups)
    scale = reference.surgery_sums([u.abs() for u in user], [a.abs() for a in align], groups)
    near(found[..., :3], want, 8 * UNIT * scale + 1e-300)


def surgery_sums(make: Maker) -> Call:
    user, align = lists(make, make.random.randint(0, 4))
    groups = grouping(make, len(user))
    args = {"user": user, "align": align, "groups": groups}

    def check(found: Tensor) -> None:
        near_sums(found, user, align, groups)

    return Call("surgery_sums", args, check, options={"groups"})


def surgery(name: str) -> Callable[[Maker], Call]:
    def build(make: Maker) -> Call:
        user, align = lists(make, make.random.randint(0, 4))
        groups, rho = grouping(make, len(user)), make.random.choice((0, 0.5, 1.0))
        args = {"user": user, "align": align, "rho": rho, "groups": groups}
        if name == "surgery_merge_":
            args["sums"] = ops.surgery_sums(user, align, groups)
        before = copy.deepcopy(user)

        def check(found: Tensor) -> None:
            near_sums(found, before, align, groups)
            exact = reference._surgery_results(found[..., :3], rho)
            near(found, exact, 1e-12 * exact.abs())
            for index, (u, old, a) in enumerate(zip(user, before, align, strict=True)):
                coefficient = float(found.view(-1, 4)[groups[index] if groups else 0, 3])
                if math.isnan(coefficient):
                    assert bits(u) == bits(old)
                    continue
                want, unit = old.double() + coefficient * a.double(), torch.finfo(u.dtype)
                rounded = unit.eps * want.abs() + 2.0**-23 * (coefficient * a.double()).abs()
                near(u.double(), want, rounded + unit.smallest_normal)

        return Call(name, args, check, ("user",), options={"groups"})

    return build


def surgery_adamw_(make: Maker) -> Call:
    user, align = lists(make, make.random.randint(0, 3), 0.04)
    groups = grouping(make, len(user))
    params, first, second = ([torch.randn_like(u) for u in user] for _ in range(3))
    second = [s.abs() + 0.25 for s in second]
    steps = [torch.full((), 3.0) for _ in user]
    step = steps if steps and make.random.random() < 0.7 else torch.full((1,), 2.0)
    args = {"params": params, "user": user, "align": align, "exp_avg": first}
    args |= {"exp_avg_sq": second, "step": step, "groups": groups, "lr": 0.01, "betas": (0.8, 0.95)}
    args |= {"rho": 0.5, "eps": 1e-6, "weight_decay": make.random.choice((0.0, 0.1)), "sums": None}
    if make.random.random() < 0.5:
        args["sums"] = ops.surgery_sums(user, align, groups)
    before = copy.deepcopy(args)

    def check(found: Tensor) -> None:
        near_sums(found, user, align, groups)
        exact = {**before, "sums": found[..., :3]}
        if not user:
            return
        reference.surgery_adamw_(**exact)
        assert bits(args["step"]) == bits(exact["step"])
        for name in ("params", "exp_avg", "exp_avg_sq"):
            for got, want in zip(args[name], exact[name], strict=True):
                # Storage roundings that fall the other way, and float32 roundings of the terms.
                unit = 1.1 * torch.finfo(got.dtype).eps
                near(got, want, unit * want.double().abs() + 4e-6 * (1 + largest**2))

    finite = [t.double().nan_to_num(0, 0, 0).abs().max() for t in (*user, *align) if t.numel()]
    largest = max(map(float, finite), default=0.0)
    written = ("params", "exp_avg", "exp_avg_sq", "step")
    return Call("surgery_adamw_", args, check, written, options={"groups", "sums"})


def subspace_surgery_(make: Maker) -> Call:
    user, _ = lists(make, make.random.randint(1, 3), 0.04)
    user, rank = [u.contiguous() for u in user], make.random.randint(1, 16)
    basis = [(torch.randn(rank, *u.shape) / 30).to(u.dtype) for u in user]
    direction = torch.randn(rank, dtype=torch.float64)
    args = {"user": user, "basis": basis, "direction": direction, "rho": 0.25}
    before = copy.deepcopy(user)

    def check(found: Tensor) -> None:
        exact = [u.double() for u in before]
        want = reference.subspace_surgery_(exact, basis, direction, 0.25)
        if math.isnan(found[0]):  # values beyond float32 are refused, too
            assert not want[0].isfinite() or want[1] > 1e37 or want[1:].abs().max() > 1e37
            assert list(map(bits, user)) == list(map(bits, before))
            return
        scale = reference.subspace_surgery_(
            [u.abs() for u in before], [b.abs() for b in basis], direction.abs()
        )
        sums = slice(1, 2 + rank)
        near(found[sums], want[sums], 8 * UNIT * scale[sums] + 1e-300)
        for u, old, vectors in zip(user, before, basis, strict=True):
            added = found[2 + rank :].view(-1, *[1] * u.dim()) * vectors.double()
            wanted, limits = old.double() + added.sum(0), torch.finfo(u.dtype)
            size = old.double().abs() + added.abs().sum(0)
            rounded = limits.eps * wanted.abs() + (rank + 2) * UNIT * size
            near(u.double(), wanted, rounded + limits.smallest_normal)

    return Call("subspace_surgery_", args, check, ("user",))


BUILDERS: tuple[Callable[[Maker], Call], ...] = (
    moments, wgrad_moments, grouped_wgrad_moments, cosine_topk, merge_topk, kl_divergence,
    kl_divergence_, surgery_sums, surgery("surgery_"), surgery("surgery_merge_"), surgery_adamw_,
    subspace_surgery_,
)  # fmt: skip

NUMBERS = ("3", None, 1.5, True, -1, -(2**80), math.nan, [1], torch.ones(()), 1j, object())


def wrong_values(call: Call, name: str, make: Maker) -> Iterator[Any]:
    """Values that an argument must refuse, whatever the other ones are."""
    value = call.args[name]
    if name in ("k", "start"):
        yield from NUMBERS
        if call.name != "merge_topk":  # which takes any k
            yield from (2**80, *((1025, 10**6) if name == "k" else ()))
        yield from (2**63 - 1,) if name == "start" and len(call.args["rows"]) else ()
    elif name in ("rho", "lr", "eps", "weight_decay"):
        yield from ("1", None, True, -1.0, math.nan, math.inf, 10**400, 1j, [1.0], torch.ones(()))
    elif name == "betas":
        yield from ((0.9,), (0.9, 0.9, 0.9), 0.9, None, "ab", (0.9, 1.0), (math.nan, 0.9), {})
        yield from ((True, 0.9), (0.9, "1"), (-0.1, 0.9), (None, 0.9), torch.ones(2) / 2)
    elif name == "axis":
        yield from ("rows", "", None, 0, ["row"], torch.ones(2), ("row", "column"), b"row")
    elif name == "unsigned":
        yield from (1, 0, None, "True", [True], torch.ones(()).bool())
    elif name in ("groups", "lengths", "experts"):
        yield from (3, "00", torch.zeros(2), {0: 0}, {0}, 1.0, object())
        held = list(value or [0] * len(call.args.get("user", ())))
        yield [*held, 0]
        for bad in ("0", None, 0.0, True, -1, 2**70, [0], math.nan) if held else ():
            at = make.random.randrange(len(held))
            yield [*held[:at], bad, *held[at + 1 :]]
    elif isinstance(value, list):
        yield from (5, "x", object(), iter(value), {"a": 1})
        yield from () if name in call.options else (None,)
        yield from (torch.ones(2, 2),) if name != "step" else ()
        for at in range(len(value)):
            if isinstance(value[at], Tensor):
                alone = len(value) == 1 and name == "grads" and not any(call.args["refs"])
                items = wrong_tensors(name, value[at], alone)
            else:
                items = iter((None, 5, "ab", [5], (), object(), [None, None], torch.ones(2, 2)))
                if name == "refs":
                    items = iter((None, 5, "ab", [5], object(), [None], torch.ones(2, 2)))
            for bad in items:
                yield [*value[:at], bad, *value[at + 1 :]]
    elif name == "sums" and value is None:
        yield from (5, "x", [1.0, 2.0, 3.0], torch.zeros(3), torch.zeros(5, 2).double())
    else:
        empty = name in ("sums", "step") and not call.args["user"]
        yield from wrong_tensors(name, value, alone=empty)


def wrong_tensors(name: str, tensor: Tensor, alone: bool) -> Iterator[Any]:
    yield from () if name == "sums" else (None,)
    yield from () if name == "step" else ([tensor],)  # a list of one counter is fine
    yield from (5, 1.5, "x", tensor.tolist(), object(), {})
    for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8):
        if tensor.dtype is not dtype:
            yield tensor.to(dtype)
    yield tensor.float().to_sparse() if tensor.dim() else tensor.cfloat()
    if not alone:
        yield tensor.to("meta")
    if name != "step":
        yield tensor[None]
    else:
        yield torch.ones(2)
    stacked = name == "refs" and tensor.dim() == 3  # one expert fewer, which may be an idle one
    if (
        tensor.dim()
        and tensor.shape[0]
        and not stacked
        and name not in ("grads", "queries", "rows")
    ):
        yield tensor[1:]


def same(call: Call) -> str:
    return f"{call.name}({', '.join(f'{k}={describe(v)}' for k, v in call.args.items())})"


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, (Tensor, list)) for v in value):
        return f"[{', '.join(map(describe, value))}]"
    return repr(value)[:80]


def attack_valid(seed: int) -> str | None:
    """One generated call; None, or what was found."""
    call = BUILDERS[seed % len(BUILDERS)](Maker(seed))
    text = same(call)
    untouched = {k: bits(v) for k, v in call.args.items() if k not in call.written}
    try:
        call.check(call.run())
        assert untouched == {k: bits(call.args[k]) for k in untouched}, "an input changed"
    except Exception as error:
        return f"seed {seed}: {text}: {type(error).__name__}: {str(error)[:200]}"
    return None


def attack_wrong(seed: int) -> str | None:
    """One generated call with one wrong argument; None, or what was found."""
    make = Maker(seed)
    call = BUILDERS[seed % len(BUILDERS)](make)
    name = make.random.choice(sorted(call.args))
    values = list(wrong_values(call, name, make))
    if not values:
        return None
    written = {key: bits(call.args[key]) for key in call.written if key != name}
    call.args[name] = make.random.choice(values)
    text = f"seed {seed}: {same(call)}, wrong: {name}"
    try:
        call.run()
    except REFUSALS as error:
        if "gradsafe" not in str(error):
            return f"{text}: {type(error).__name__} does not name gradsafe: {str(error)[:200]}"
    except Exception as error:
        return f"{text}: {type(error).__name__}: {str(error)[:200]}"
    else:
        return f"{text}: accepted"
    return None if written == {k: bits(call.args[k]) for k in written} else f"{text}: written"


@pytest.mark.parametrize("attack", [attack_valid, attack_wrong])
def test_generated_calls(attack: Callable[[int], str | None]) -> None:
    findings = [found for seed in range(CALLS) if (found := attack(seed))]
    assert not findings, "\n".join([f"{len(findings)} of {CALLS}", *findings[:20]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=10**6, help="first seed")
    options = parser.parse_args()
    end, seed, counts = time.monotonic() + 60 * options.minutes, options.seed, Counter[str]()
    while time.monotonic() < end:
        for kind, attack in (("valid", attack_valid), ("wrong", attack_wrong)):
            counts[kind] += 1
            if found := attack(seed):
                counts[f"{kind}, findings"] += 1
                print(found, flush=True)
        seed += 1
    print(dict(counts))
    raise SystemExit(any("findings" in kind for kind in counts))


if __name__ == "__main__":
    main()

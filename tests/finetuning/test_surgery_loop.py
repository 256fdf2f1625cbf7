from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsafe import GradientSurgery
from gradsafe.ops import _default as reference


def make_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5)).to(dtype)


def losses(net: nn.Module, conflict: bool = True) -> tuple[Tensor, Tensor]:
    """Two losses whose gradients clearly conflict, or clearly agree."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 7, generator=generator).to(next(net.parameters()).dtype)
    y = net(x)
    user = (y - 1).square().mean() + 0.3 * y[:, 0].mean()
    align = (y + (1 if conflict else -0.5)).square().mean() + 0.1 * y[:, 1].sin().mean()
    return user, align


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters()]


def separate(net: nn.Module, conflict: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """The two gradients, taken from a copy of the network."""
    twin = copy.deepcopy(net)
    both = []
    for index in range(2):
        twin.zero_grad()
        losses(twin, conflict)[index].backward()
        both.append(gradients(twin))
    return both[0], both[1]


def step(net: nn.Module, surgery: GradientSurgery, conflict: bool = True) -> Tensor:
    losses(net, conflict)[0].backward()
    surgery.stash()
    losses(net, conflict)[1].backward()
    return surgery.merge()


def assert_merged(net: nn.Module, user: list[Tensor], align: list[Tensor], rho: float) -> None:
    expected = [u.double() for u in user]
    reference.surgery_(expected, [a.double() for a in align], rho)
    scale = max(float(e.abs().max()) for e in expected)
    unit = torch.finfo(user[0].dtype).eps
    for parameter, want in zip(net.parameters(), expected, strict=True):
        assert parameter.grad.dtype == parameter.dtype
        assert torch.all((parameter.grad.double() - want).abs() <= 2 * unit * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rho", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("conflict", [True, False])
def test_the_merged_gradient_is_the_formula(conflict: bool, rho: float, dtype: torch.dtype) -> None:
    net = make_net(dtype)
    user, align = separate(net, conflict)
    results = step(net, GradientSurgery(net.parameters(), rho), conflict)
    assert bool(results[0, 0] < 0) == conflict
    assert_merged(net, user, align, rho)


def test_stash_and_merge_copy_nothing() -> None:
    net = make_net()
    surgery = GradientSurgery(net.parameters())
    losses(net)[0].backward()
    before = [p.grad.data_ptr() for p in net.parameters()]
    surgery.stash()
    assert all(p.grad is None for p in net.parameters())
    losses(net)[1].backward()
    assert not {p.grad.data_ptr() for p in net.parameters()} & set(before)
    surgery.merge()
    assert [p.grad.data_ptr() for p in net.parameters()] == before


def test_both_losses_may_be_accumulated() -> None:
    net = make_net()
    whole = separate(net)
    surgery = GradientSurgery(net.parameters())
    for index, finish in ((0, surgery.stash), (1, surgery.merge)):
        for share in (0.25, 0.5, 0.25):
            (share * losses(net)[index]).backward()
        finish()
    assert_merged(net, *whole, rho=1.0)


def test_missing_gradients() -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(4)]
    surgery = GradientSurgery(params, rho=2.0)
    (params[0] * torch.tensor([1.0, 2, 3, 4]) + 3 * params[1]).sum().backward()
    surgery.stash()
    (-2 * params[0] + 5 * params[2]).sum().backward()
    results = surgery.merge()
    coefficient = 2.0 + 20.0 / (16.0 + 100.0)  # dot -20; the third parameter counts in <a, a>
    assert results[0].tolist() == pytest.approx([-20.0, 66.0, 116.0, coefficient])
    assert torch.allclose(params[0].grad, torch.tensor([1.0, 2, 3, 4]) - 2 * coefficient)
    assert torch.equal(params[1].grad, torch.full((4,), 3.0))
    assert torch.allclose(params[2].grad, torch.full((4,), 5 * coefficient))
    assert params[3].grad is None


def test_dtypes_may_be_mixed_and_frozen_parameters_are_left_out() -> None:
    params = [nn.Parameter(torch.randn(50, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    surgery = GradientSurgery([*params, frozen])
    assert surgery.parameters == params
    for p in params:
        p.grad = torch.randn_like(p)
    user = [p.grad.clone() for p in params]
    surgery.stash()
    for p, u in zip(params, user, strict=True):
        p.grad = torch.randn_like(p) - 2 * u
    align = [p.grad.clone() for p in params]
    surgery.merge()
    expected = [u.double() for u in user]
    reference.surgery_(expected, [a.double() for a in align])
    for p, want, u in zip(params, expected, user, strict=True):
        error = (p.grad.double() - want).abs()
        rounding = 2.0**-22 * ((want - u).abs() + u.abs())  # before the two parts cancel
        assert torch.all(error <= torch.finfo(p.dtype).eps / 2 * want.abs() + rounding)


class TestScope:
    def blocks(self) -> nn.Module:
        """Three blocks, of which one conflicts, and a parameter outside of them."""
        net = nn.Module()
        net.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        net.norm = nn.LayerNorm(3)
        return net

    def run(self, scope: Any) -> tuple[list[Tensor], list[Tensor], GradientSurgery]:
        net = self.blocks()
        surgery = GradientSurgery(net.named_parameters(), scope=scope)
        for sign in (1.0, 2.0):
            for name, p in net.named_parameters():
                p.grad = torch.full_like(p, -sign if "layers.1" in name and sign > 1 else sign)
            finish = surgery.stash if sign == 1 else surgery.merge
            finish()
        return [p.grad for p in net.parameters()], list(net.parameters()), surgery

    @pytest.mark.parametrize(("scope", "tests"), [("tensor", 8), ("layer", 4)])
    def test_only_what_conflicts_is_projected(self, scope: str, tests: int) -> None:
        merged, _, surgery = self.run(scope)
        assert len(surgery.results) == tests
        for index, gradient in enumerate(merged):
            # In the conflict all of the user gradient lies along the other one.
            assert torch.all(gradient == (-2.0 if index in (2, 3) else 3.0))
        assert surgery.statistics().conflict_rate == 0.25

    def test_global_does_not_see_one_block(self) -> None:
        merged, _, surgery = self.run("global")
        assert surgery.results[0, 3] == 1
        assert torch.all(merged[2] == -1)

    def test_a_block_without_gradients_has_no_test(self) -> None:
        net = self.blocks()
        surgery = GradientSurgery(net.named_parameters(), scope="layer")
        for finish in (surgery.stash, surgery.merge):
            net.layers[2].weight.grad = torch.ones(3, 3)
            finish()
        assert surgery.results.shape == (1, 4)


class TestNonfinite:
    def pair(self, bad: str, surgery: GradientSurgery, params: list[nn.Parameter]) -> None:
        for loss, finish in (("user", surgery.stash), ("align", surgery.merge)):
            for p in params:
                p.grad = torch.ones_like(p)
            if loss == bad:
                params[1].grad[2] = math.inf
            finish()

    @pytest.mark.parametrize("bad", ["user", "align"])
    def test_an_optimizer_step_then_changes_nothing(self, bad: str) -> None:
        params = [nn.Parameter(torch.randn(5)) for _ in range(3)]
        surgery = GradientSurgery(params)
        optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)
        self.pair("", surgery, params)
        optimizer.step()
        before = copy.deepcopy([params, optimizer.state_dict()])
        self.pair(bad, surgery, params)
        assert all(p.grad is None for p in params)
        optimizer.step()
        for p, old in zip(params, before[0], strict=True):
            assert torch.equal(p, old)
        assert str(optimizer.state_dict()) == str(before[1])
        assert surgery.skipped == 1
        self.pair("", surgery, params)
        assert all(p.grad is not None for p in params)
        assert surgery.statistics().steps == 2

    @pytest.mark.parametrize("bad", ["user", "align"])
    def test_one_bad_test_of_many_skips_all(self, bad: str) -> None:
        params = [nn.Parameter(torch.randn(5)) for _ in range(3)]
        surgery = GradientSurgery(params, scope="tensor")
        self.pair(bad, surgery, params)
        assert all(p.grad is None for p in params)
        assert surgery.skipped == 1

    @pytest.mark.parametrize("bad", ["user", "align", ""])
    def test_a_grad_scaler_skips_a_poisoned_step(self, bad: str) -> None:
        params = [nn.Parameter(torch.randn(5)) for _ in range(3)]
        before = copy.deepcopy(params)
        surgery = GradientSurgery(params, on_nonfinite="poison")
        optimizer = torch.optim.SGD(params, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))  # a scaler starts with its first loss
        self.pair(bad, surgery, params)
        if not bad:  # two gradients of ones, no conflict
            assert all(torch.equal(p.grad, torch.full((5,), 2.0)) for p in params)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (2.0 if bad else 4.0)
        for p, old in zip(params, before, strict=True):
            assert torch.equal(p, old) == bool(bad)
        assert surgery.skipped == (1 if bad else 0)


def test_scaled_losses_give_the_scaled_result() -> None:
    results = []
    for factor in (1.0, 1024.0):  # powers of two round alike
        net = make_net()
        surgery = GradientSurgery(net.parameters())
        (factor * losses(net)[0]).backward()
        surgery.stash()
        (factor * losses(net)[1]).backward()
        surgery.merge()
        results.append(([p.grad / factor for p in net.parameters()], surgery.statistics()))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one, other)
    assert results[0][1].cosine == pytest.approx(results[1][1].cosine, rel=1e-12)
    assert results[1][1].user_norm == pytest.approx(1024 * results[0][1].user_norm)


def test_without_projection_it_is_the_weighted_sum() -> None:
    net = make_net()
    user, align = separate(net)
    results = step(net, GradientSurgery(net.parameters(), 0.5, projection=False))
    assert results[0, 0] < 0  # reported as it is
    assert results[0, 3] == 0.5
    for p, u, a in zip(net.parameters(), user, align, strict=True):
        assert torch.allclose(p.grad, u + 0.5 * a, rtol=0, atol=1e-6)


class TestStatistics:
    def test_are_means_over_the_steps_since_the_reset(self) -> None:
        surgery = GradientSurgery([parameter := nn.Parameter(torch.zeros(2))])
        for angle in (0.0, math.pi / 3, math.pi, math.pi / 2):
            parameter.grad = torch.tensor([3.0, 0.0])
            surgery.stash()
            parameter.grad = 2 * torch.tensor([math.cos(angle), math.sin(angle)])
            surgery.merge()
        read = surgery.statistics()
        assert (read.steps, read.skipped) == (4, 0)
        assert read.cosine == pytest.approx((1 + 0.5 - 1) / 4, abs=1e-7)
        assert read.conflict_rate == pytest.approx(0.25, abs=0.26)  # pi/2 may round below zero
        assert read.user_norm == pytest.approx(3)
        assert read.align_norm == pytest.approx(2)
        assert read == surgery.statistics()
        surgery.reset_statistics()
        assert surgery.statistics().steps == 0
        assert math.isnan(surgery.statistics().cosine)

    def test_many_steps_are_folded(self) -> None:
        surgery = GradientSurgery([parameter := nn.Parameter(torch.zeros(2))])
        for index in range(600):
            for finish in (surgery.stash, surgery.merge):
                parameter.grad = torch.ones(2) * (math.nan if index % 100 == 7 else 1.0)
                finish()
        assert surgery.statistics().steps == 594
        assert surgery.skipped == 6
        surgery.reset_statistics()
        assert surgery.skipped == 6

    def test_without_alignment_gradient_the_cosine_is_zero(self) -> None:
        surgery = GradientSurgery([parameter := nn.Parameter(torch.zeros(2))])
        for value, finish in ((1.0, surgery.stash), (0.0, surgery.merge)):
            parameter.grad = torch.full((2,), value)
            finish()
        assert surgery.statistics().cosine == 0
        assert torch.equal(parameter.grad, torch.ones(2))


class TestErrors:
    def params(self) -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(3)) for _ in range(2)]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rho": -1.0}, "expected rho to be finite and >= 0, got -1"),
            ({"rho": math.nan}, "expected rho"),
            ({"scope": "row"}, "expected scope to be one of"),
            ({"scope": "layer"}, "needs names; pass model.named_parameters"),
            ({"on_nonfinite": "ignore"}, "expected on_nonfinite to be one of"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GradientSurgery(self.params(), **options)

    def test_parameters(self) -> None:
        one = self.params()
        with pytest.raises(ValueError, match="none of the 0 parameters requires"):
            GradientSurgery([])
        with pytest.raises(ValueError, match="none of the 2 parameters requires"):
            GradientSurgery([p.requires_grad_(False) for p in self.params()])
        with pytest.raises(ValueError, match=r"parameters\[2\] is listed twice"):
            GradientSurgery([*one, one[0]])
        with pytest.raises(TypeError, match=r"parameters\[0\] to be a tensor, got str"):
            GradientSurgery(["weight"])
        with pytest.raises(TypeError, match="put a single parameter into a list"):
            GradientSurgery(one[0])
        with pytest.raises(TypeError, match=r"parameters\[0\] of dtype .* got torch.float64"):
            GradientSurgery([nn.Parameter(torch.ones(2, dtype=torch.float64))])

        with pytest.raises(TypeError, match=r"parameters\[0\] to be a parameter or \(name, param"):
            GradientSurgery([(one[0], "weight")])
        with pytest.raises(TypeError, match=r"parameter group to have params, got \['lr'\]"):
            GradientSurgery([{"lr": 0.1}])

    def test_sparse_gradients(self) -> None:
        table = nn.Embedding(4, 2, sparse=True)
        surgery = GradientSurgery(table.parameters())
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(TypeError, match=r"parameter 0 \[4, 2\] to be dense.*sparse=False"):
            surgery.stash()

    def test_param_groups_of_an_optimizer(self) -> None:
        one = self.params()
        optimizer = torch.optim.SGD([{"params": one[:1]}, {"params": one[1:], "lr": 0.1}])
        assert GradientSurgery(optimizer.param_groups).parameters == one
        net = make_net()
        named = torch.optim.SGD(net.named_parameters(), lr=0.1)
        assert len(GradientSurgery(named.param_groups, scope="layer").parameters) == 4

    def test_order_of_calls(self) -> None:
        one = self.params()
        surgery = GradientSurgery(one)
        with pytest.raises(RuntimeError, match=r"stash\(\) found no gradient"):
            surgery.stash()
        one[0].grad = torch.ones(3)
        with pytest.raises(RuntimeError, match=r"merge\(\) without stash"):
            surgery.merge()
        assert one[0].grad is not None
        surgery.stash()
        with pytest.raises(RuntimeError, match=r"merge\(\) found no gradient"):
            surgery.merge()
        one[0].grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="called twice"):
            surgery.stash()
        surgery.discard()
        surgery.stash()

    def test_gradients_in_one_buffer(self) -> None:
        one = self.params()
        surgery = GradientSurgery(one)
        bucket = torch.ones(6)
        for finish in (surgery.stash, surgery.merge):
            one[0].grad, one[1].grad = bucket[:3], bucket[3:]
            if finish == surgery.stash:
                finish()
        with pytest.raises(ValueError, match="gradient_as_bucket_view=False"):
            surgery.merge()

    def test_gradients_of_another_dtype(self) -> None:
        one = self.params()
        surgery = GradientSurgery(one)
        one[0].grad = torch.ones(3)
        surgery.stash()
        one[0].data = one[0].data.bfloat16()
        one[0].grad = torch.ones(3, dtype=torch.bfloat16)
        with pytest.raises(TypeError, match=r"align\[0\] of dtype torch.float32"):
            surgery.merge()

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsafe._backend import _C
from gradsafe.ops import _default as reference
from gradsafe.ops import surgery_, surgery_merge_, surgery_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(7, 33), (300, 513), (), (1, 5), (40_000,), (2, 3, 4), (0, 3)]
TILE = 32768


def make(shapes=SHAPES, dtype=torch.float32, conflict=True, device="cpu", scale=1.0):
    """A pair of lists whose dot product is clearly negative, or clearly positive."""
    user = [torch.randn(shape) for shape in shapes]
    align = [(torch.randn_like(u) - 2 * u) * (scale if conflict else -scale) for u in user]
    return [u.to(device, dtype) for u in user], [a.to(device, dtype) for a in align]


def copies(tensors):
    return [t.clone() for t in tensors]


def flat(tensors) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


def magnitudes(user, align):
    """Sums of absolute terms: the natural scale of the rounding error of the sums."""
    return reference.surgery_sums([u.abs() for u in user], [a.abs() for a in align])


def assert_close_to_oracle(user, align, rho=1.0, ulps=8.0, roundings=1.5):
    """Sums within a few float32 roundings of their terms, elements within a storage rounding."""
    before, expected = copies(user), copies(user)
    want = reference.surgery_(expected, align, rho)
    got = surgery_(user, align, rho)
    assert got.dtype == torch.float64
    assert torch.all((got - want)[:3].abs() <= ulps * 2.0**-24 * magnitudes(before, align) + 1e-300)
    coefficient = reference.surgery_merge_([], [], got[:3], rho)[3]
    assert got[3].item() == pytest.approx(coefficient.item(), rel=1e-15)
    for u, old, a in zip(user, before, align, strict=True):
        exact = old.double() + float(got[3]) * a.double()
        # Rounded: the coefficient, scalar code's product, and the result to the tensor's dtype.
        unit = torch.finfo(u.dtype).eps / 2
        bound = roundings * unit * exact.abs() + 2.0**-23 * (float(got[3]) * a.double()).abs()
        assert torch.all((u.double() - exact).abs() <= bound + torch.finfo(u.dtype).tiny)
    return got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rho", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("conflict", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle(dtype, conflict, rho, device):
    user, align = make(dtype=dtype, conflict=conflict, device=device)
    got = assert_close_to_oracle(user, align, rho)
    assert (got[0] < 0) == conflict
    assert (got[3] > rho) == conflict


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    assert _C.cpu_isa() == isa
    assert_close_to_oracle(*make(dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype):
    squared = torch.zeros(2, 3, dtype=torch.float64)
    elements = torch.zeros(2, dtype=torch.float64)
    for _ in range(30):  # a single draw can be exact by luck; compare root mean squares
        user, align = make([(130, 150), (7, 33)], dtype)
        plain, exact = copies(user), [u.double() for u in user]
        want = reference.surgery_(exact, [a.double() for a in align])
        eager = reference.surgery_(plain, align, dtype=None)
        got = surgery_(user, align)
        squared += torch.stack([(r - want)[:3].square() for r in (got, eager)])
        elements += torch.stack([(flat(r) - flat(exact)).square().sum() for r in (user, plain)])
    assert torch.all(squared[0].sqrt() <= 2 * squared[1].sqrt())
    assert elements[0].sqrt() <= 2 * elements[1].sqrt()


def test_the_projection_is_orthogonal_and_never_longer():
    user, align = make()
    before = copies(user)
    surgery_(user, align, rho=0.0)
    cosine = flat(user) @ flat(align) / flat(user).norm() / flat(align).norm()
    assert abs(cosine) < 1e-6
    assert flat(user).norm() <= flat(before).norm()


def test_without_rho_the_scale_of_the_alignment_gradient_does_not_matter():
    results = []
    for exponent in (-30, 0, 30):  # powers of two round alike
        torch.manual_seed(0)
        user, align = make(scale=2.0**exponent)
        surgery_(user, align, rho=0.0)
        results.append(flat(user))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_without_conflict_and_rho_nothing_is_written():
    user, align = make(conflict=False)
    before = copies(user)
    assert surgery_(user, align, rho=0.0)[3] == 0
    assert all(torch.equal(a, b) for a, b in zip(user, before, strict=True))


def test_there_is_one_test_over_the_whole_list():
    """The first tensor agrees, the second conflicts more: both are projected."""
    user = [torch.tensor([1.0, 0.0]), torch.tensor([3.0])]
    align = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0])]
    result = surgery_(user, align, rho=0.0)
    assert result.tolist() == [-2.0, 10.0, 2.0, 1.0]
    assert user[0].tolist() == [2.0, 0.0]
    assert user[1].tolist() == [2.0]


@pytest.mark.parametrize("device", DEVICES)
def test_groups_are_independent_lists(device):
    user, align = make(device=device)
    align[0] = -align[0]
    groups = [1, 0, 2, 1, 0, 1, 1]
    together = copies(user)
    results = surgery_(together, align, 0.5, groups)
    assert results.shape == (3, 4)
    for group in range(3):
        members = [i for i, g in enumerate(groups) if g == group]
        alone = copies(user[i] for i in members)
        result = surgery_(alone, [align[i] for i in members], 0.5)
        assert torch.equal(result, results[group])
        assert all(torch.equal(together[i], a) for i, a in zip(members, alone, strict=True))


@pytest.mark.parametrize("groups", [None, [1, 0, 2, 1, 0, 1, 1]])
def test_the_halves_make_the_whole(groups):
    user, align = make()
    split = copies(user)
    whole = surgery_(user, align, 0.7, groups)
    sums = surgery_sums(split, align, groups)
    result = surgery_merge_(split, align, sums, 0.7, groups)
    assert torch.equal(sums, whole[..., :3])
    assert torch.equal(result, whole)
    assert all(torch.equal(a, b) for a, b in zip(user, split, strict=True))


def test_shards_with_added_sums_equal_the_whole():
    user, align = make([(64, 100), (50,)])
    shards = [(copies(u[:k] for u in user), [a[:k] for a in align]) for k in (20,)]
    shards += [(copies(u[20:] for u in user), [a[20:] for a in align])]
    sums = sum(surgery_sums(u, a) for u, a in shards)
    for u, a in shards:
        surgery_merge_(u, a, sums)
    surgery_(user, align)
    for whole, *parts in zip(user, *(u for u, _ in shards), strict=True):
        assert torch.allclose(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def test_a_rank_may_lack_a_group_or_every_tensor():
    sums = torch.tensor([[-1.0, 1.0, 2.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    user = [torch.ones(3)]
    result = surgery_merge_(user, [torch.ones(3)], sums, 1.0, [1])
    assert result[:, 3].tolist() == [1.5, 1.0]
    assert user[0].tolist() == [2.0] * 3
    assert surgery_merge_([], [], sums, 0.0, [])[:, 3].tolist() == [0.5, 0.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["user", "align"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
def test_non_finite_values_leave_the_user_gradient_untouched(bad, side, device):
    user, align = make(device=device)
    {"user": user, "align": align}[side][1][100, 7] = bad
    before = copies(user)
    result = surgery_(user, align)
    assert not result[:3].isfinite().all()
    assert result[3].isnan()
    for a, b in zip(user, before, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_group_with_nan_does_not_hold_up_the_others():
    user, align = make([(5,), (6,)])
    align[0][2] = math.nan
    before = copies(user)
    results = surgery_(user, align, groups=[0, 1])
    assert results[:, 3].isnan().tolist() == [True, False]
    assert torch.equal(user[0], before[0])
    assert not torch.equal(user[1], before[1])


def test_zero_alignment_gradient_and_exact_orthogonality():
    user = [torch.randn(50)]
    before = copies(user)
    assert surgery_(user, [torch.zeros(50)], 0.5).tolist()[2:] == [0.0, 0.5]
    assert torch.equal(user[0], before[0])
    user, align = [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 3.0])]
    assert surgery_(user, align, 0.5).tolist() == [0.0, 1.0, 9.0, 0.5]
    assert user[0].tolist() == [1.0, 1.5]


def test_a_coefficient_beyond_float32_counts_as_non_finite():
    user = [torch.ones(3)]
    sums = torch.tensor([-1e30, 1.0, 1e-30], dtype=torch.float64)
    assert surgery_merge_(user, [torch.ones(3)], sums)[3].isnan()
    assert user[0].tolist() == [1.0] * 3


@pytest.mark.parametrize("value", [1.0, 2.0**-8, 3.0**-13, 65504.0, 7e-8, -5e-5, 0.0, -0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rounding_is_that_of_pytorch(isa, dtype, value):
    spread = torch.tensor([value]) * torch.linspace(0.99, 1.01, 1021)
    user = [spread.to(dtype)]
    align = [torch.linspace(-1, 1, 1021).to(dtype) * (abs(value) + 1e-7) / 64]
    sums = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    expected = (user[0].float() + 0.375 * align[0].float()).to(dtype)
    surgery_merge_(user, align, sums, 0.375)
    assert torch.equal(user[0], expected)


def test_16_bit_overflow_becomes_infinity():
    for dtype in (torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        user, align = [torch.full((40,), largest, dtype=dtype)], [torch.full((40,), largest / 2)]
        sums = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
        surgery_merge_(user, [align[0].to(dtype)], sums)
        assert torch.isinf(user[0]).all()


def test_vector_levels_agree_bit_by_bit():
    if not {"avx2", "avx512"} <= set(_C.cpu_isas()):
        pytest.skip("needs a machine with AVX-512")
    for dtype in DTYPES:
        user, align = make(dtype=dtype)
        results = []
        for level in ("avx2", "avx512"):
            _C.set_cpu_isa(level)
            mine = copies(user)
            results.append([surgery_(mine, align), *mine])
        _C.set_cpu_isa("auto")
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bitwise_equal_for_any_number_of_threads():
    user, align = make([(600, 2100), (5, 5), (1030, 64)])
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        mine = copies(user)
        results.append([surgery_(mine, align), *mine])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


SIZES = st.sampled_from([0, 1, 15, 16, 17, 1023, 1024, 1025, TILE - 1, TILE, TILE + 1, 3 * TILE])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=6),
    conflict=st.booleans(),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    rho=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_any_sizes_and_mixed_dtypes(sizes, conflict, dtypes, rho):
    user, align = make([(n,) for n in sizes], conflict=conflict)
    user = [u.to(d) for u, d in zip(user, dtypes, strict=False)]
    align = [a.to(d) for a, d in zip(align, dtypes, strict=False)]
    assert_close_to_oracle(user, align, rho)


def test_long_lists():
    user, align = make([(i % 7,) for i in range(2000)])
    assert_close_to_oracle(user, align)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_dense_layout_and_odd_alignment(dtype, device):
    user, align = make([(50, 70), (3, 8, 5, 6), (9, 1, 4)], dtype, device=device)
    layouts = [
        lambda t: t.t(),
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t,
    ]
    user = [f(u) for f, u in zip(layouts, user, strict=True)]
    align = [f(a) for f, a in zip(layouts, align, strict=True)]
    assert not user[0].is_contiguous()
    assert_close_to_oracle(user, align)
    memory = torch.randn(2 * TILE + 41).to(device, dtype)
    other = torch.randn(2 * TILE + 43).to(device, dtype) - 2 * torch.cat([memory, memory[:2]])
    assert_close_to_oracle([memory[1:-3]], [other[3:-3]])


def test_memory_around_the_tensors_is_neither_read_nor_written():
    memory = torch.full((3, 1000), math.nan)
    memory[:, 13:970] = torch.randn(3, 957)
    user, align = [memory[0, 13:970]], [memory[1, 13:970]]
    assert_close_to_oracle(user, align)
    assert memory[:, :13].isnan().all()
    assert memory[:, 970:].isnan().all()


def test_the_alignment_gradient_is_only_read():
    user, align = make()
    before = copies(align)
    surgery_(user, align)
    assert all(torch.equal(a, b) for a, b in zip(align, before, strict=True))


def test_empty_lists():
    assert surgery_([], [], 0.3).tolist() == [0.0, 0.0, 0.0, 0.3]
    assert surgery_([], [], groups=[]).shape == (0, 4)
    assert surgery_sums([], []).tolist() == [0.0] * 3
    assert surgery_([torch.ones(0, 3)], [torch.ones(0, 3)]).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_autograd_notices_the_write():
    user, align = make([(3,)])
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * user[0]).sum()
    surgery_(user, align)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    user, align = make([(5, 7), (2, 3)])
    operators = torch.ops.gradsafe
    for groups, count in (([], 1), ([1, 0], 2)):
        sums = surgery_sums(user, align, groups or None).view(count, 3)
        torch.library.opcheck(operators.surgery_sums.default, (user, align, groups, count))
        torch.library.opcheck(operators.surgery_merge_.default, (user, align, sums, 0.5, groups))
        torch.library.opcheck(operators.surgery_.default, (user, align, 0.5, groups, count))


@pytest.mark.parametrize("groups", [None, [0, 1]])
def test_compiles_into_one_graph(groups):
    def step(user, align):
        user = [u * 2 for u in user]
        whole = surgery_(user, align, 0.5, groups)
        sums = surgery_sums(user, align, groups)
        return [whole, surgery_merge_(user, align, sums, 0.5, groups), *user]

    user, align = make([(6, 9), (3, 20)])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(user, align), step(user, align), strict=True):
        assert torch.equal(a, b)


def test_compiled_code_writes_its_inputs():
    compiled = torch.compile(surgery_, fullgraph=True, backend="aot_eager")
    user, align = make([(6, 9), (3, 20)])
    expected = copies(user)
    assert torch.equal(compiled(user, align), surgery_(expected, align))
    assert all(torch.equal(a, b) for a, b in zip(user, expected, strict=True))


def test_meta_tensors_have_the_real_shapes():
    user, align = make([(6, 9)], device="meta")
    for groups, shape in ((None, (4,)), ([0], (1, 4))):
        result = surgery_(user, align, groups=groups)
        assert result.is_meta
        assert result.shape == shape
        assert result.dtype == torch.float64


U, A = torch.ones(3, 4), torch.ones(3, 4)
S = torch.ones(3, dtype=torch.float64)
BAD_CALLS = [
    (lambda: surgery_(U, [A]), TypeError, "user to be a list of tensors, got Tensor"),
    (lambda: surgery_([U], [A.numpy()]), TypeError, r"align\[0\] to be a tensor"),
    (lambda: surgery_([U], []), ValueError, "align to hold 1 tensors like user, got 0"),
    (lambda: surgery_([U.double()], [A]), TypeError, "bfloat16 or float16, got torch.float64"),
    (lambda: surgery_([U], [A.half()]), TypeError, r"align\[0\] of dtype torch.float32"),
    (lambda: surgery_([U], [A.t().contiguous()]), ValueError, r"shape \[3, 4\] like user\[0\]"),
    (lambda: surgery_([U.clone()], [torch.ones(4, 3).t()]), ValueError, r"strides \[4, 1\] like"),
    (lambda: surgery_([torch.ones(3, 9)[:, :4]], [A]), ValueError, "without gaps or overlaps"),
    (lambda: surgery_([torch.ones(1).expand(4)], [A[0]]), ValueError, "without gaps or overlaps"),
    (lambda: surgery_([U.to_sparse()], [A]), TypeError, "to be dense"),
    (lambda: surgery_([U], [A.to("meta")]), ValueError, r"align\[0\] on cpu"),
    (lambda: surgery_([U], [A], math.nan), ValueError, "rho to be finite and >= 0, got nan"),
    (lambda: surgery_([U], [A], -1.0), ValueError, "rho to be finite and >= 0, got -1.0"),
    (lambda: surgery_([U], [A], S[0]), TypeError, "rho to be a number"),
    (lambda: surgery_([U.clone().requires_grad_()], [A]), ValueError, r"call \.detach\(\)"),
    (lambda: surgery_([U], [A.clone().requires_grad_()]), ValueError, r"align\[0\] not to require"),
    (lambda: surgery_([U], [A], groups=[0, 0]), ValueError, "one group for each of 1 tensors"),
    (lambda: surgery_([U], [A], groups=[1]), ValueError, r"groups\[0\] between 0 and 0"),
    (lambda: surgery_([U], [A], groups=torch.zeros(1)), TypeError, "list of ints, got a tensor"),
    (lambda: surgery_([U], [A], groups=[None]), TypeError, r"groups\[0\] to be an int, got None"),
    (lambda: surgery_([U], [A], groups=3), TypeError, "groups to be a list of ints, got int"),
    (lambda: surgery_([U], [A], 10**400), ValueError, "rho to be finite and >= 0"),
    (lambda: surgery_([U.to_sparse()], [A]), TypeError, r"user\[0\] to be dense"),
    (lambda: surgery_([U], [A.to_sparse()]), TypeError, r"align\[0\] to be dense"),
    (lambda: surgery_merge_([U], [A], 1.0), TypeError, "sums to be a tensor, got float"),
    (lambda: surgery_merge_([U], [A], S.float()), TypeError, "sums of dtype float64"),
    (lambda: surgery_merge_([U], [A], S[:2]), ValueError, r"sums of shape \[3\], got \[2\]"),
    (lambda: surgery_merge_([U], [A], S, groups=[0]), ValueError, r"shape \[G, 3\], got \[3\]"),
    (lambda: surgery_merge_([U], [A], S.to("meta")), ValueError, "sums on cpu"),
    (
        lambda: surgery_merge_([U], [A], S[None], groups=[1]),
        ValueError,
        r"groups\[0\] between 0 and 0 \(groups are rows of sums\)",
    ),
    (lambda: surgery_([U, U], [A, A.clone()]), RuntimeError, "not to share memory"),
    (lambda: surgery_([U], [U]), RuntimeError, "not to share memory"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_bad_arguments_name_the_argument(call, error, text):
    before = U.clone()
    with pytest.raises(error, match=text):
        call()
    assert torch.equal(U, before)


def test_the_sums_are_no_part_of_what_is_written():
    buffer = torch.zeros(12, dtype=torch.float64)
    user, align = [buffer.view(torch.float32)[:16]], [torch.zeros(16)]
    with pytest.raises(RuntimeError, match=r"user\[0\] and sums not to share memory"):
        surgery_merge_(user, align, buffer[7:10])
    surgery_merge_(user, align, buffer[8:11])
    surgery_merge_(user, [user[0].clone()], buffer[9:12])


T = torch.ones(3, 4).t()
RAW_CALLS = [
    (([U], [], 1.0, [], 1), "1 tensors in align, got 0"),
    (([U.double()], [A], 1.0, [], 1), r"user\[0\] of dtype"),
    (([U], [A.half()], 1.0, [], 1), r"align\[0\] of the dtype of user\[0\]"),
    (([U], [A[:2]], 1.0, [], 1), r"align\[0\] of shape \[3, 4\] like user\[0\], got \[2, 4\]"),
    (([T], [torch.ones(4, 3)], 1.0, [], 1), r"align\[0\] with strides \[1, 4\]"),
    (([U[:, ::2]], [A[:, ::2]], 1.0, [], 1), "without gaps"),
    (([U], [A], 1.0, [0, 0], 1), "one group for each of 1"),
    (([U], [A], 1.0, [1], 1), r"groups\[0\] between 0 and 0, got 1"),
    (([U, U], [A, A], 1.0, [], 1), r"user\[[01]\] and user\[[01]\] not to share memory"),
]


@pytest.mark.parametrize(("args", "text"), RAW_CALLS)
def test_the_backend_checks_again(args, text):
    with pytest.raises(RuntimeError, match=text):
        torch.ops.gradsafe.surgery_(*args)


@pytest.mark.gpu
def test_gpu_agrees_with_the_cpu():
    for dtype, groups in itertools.product(DTYPES, (None, [1, 0, 2, 1, 0, 1, 1])):
        user, align = make(dtype=dtype)
        on_gpu = [u.cuda() for u in user]
        result = surgery_(on_gpu, [a.cuda() for a in align], 0.5, groups)
        want = surgery_(user, align, 0.5, groups)
        assert torch.allclose(result.cpu(), want, rtol=1e-5)
        for a, b in zip(on_gpu, user, strict=True):
            rtol = 2 * torch.finfo(dtype).eps  # one rounding may fall the other way
            assert torch.allclose(a.cpu().float(), b.float(), rtol=rtol, atol=4e-6)

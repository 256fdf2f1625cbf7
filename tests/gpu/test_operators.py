"""Every operator on a real GPU: oracle, determinism, streams, graphs, poison."""

from __future__ import annotations

import pytest
import torch
from gpu_operators import MORE, OPERATORS, Operator, flat, map_tensors, registered

from gradsafe.ops import AXES, moments, wgrad_moments
from gradsafe.ops import _default as reference

pytestmark = pytest.mark.gpu


def named(operator: Operator) -> str:
    return f"{operator.name}-{operator.label}"


def in_this_build(operator: Operator) -> Operator:
    if not registered(operator):
        pytest.skip(f"{operator.name} has no CUDA kernel in this build")
    return operator


@pytest.fixture(params=OPERATORS, ids=named)
def operator(request: pytest.FixtureRequest) -> Operator:
    return in_this_build(request.param)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("operator", [*OPERATORS, *MORE], ids=named)
def test_equals_the_oracle_and_the_cpu(operator, axis, paths):
    arguments = in_this_build(operator).make("cuda")
    with paths:
        got = flat(operator.call(*arguments, axis))
    on_cpu = flat(operator.call(*map_tensors(arguments, torch.Tensor.cpu), axis))
    want = flat(operator.oracle(*arguments, axis))
    scale = flat(operator.terms(*arguments, axis))
    for a, c, b, s in zip(got, on_cpu, want, scale, strict=True):
        assert torch.all((a - b).abs() <= 16 * 2.0**-24 * s + 1e-300)
        assert torch.all((a.cpu() - c).abs() <= 24 * 2.0**-24 * s.cpu() + 1e-300)


@pytest.mark.parametrize("axis", AXES)
def test_repeats_are_bitwise_equal(operator, axis):
    arguments = operator.make("cuda")
    first = flat(operator.call(*arguments, axis))
    for _ in range(5):
        again = flat(operator.call(*arguments, axis))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_runs_on_the_current_stream(operator):
    """The input is written late on a side stream; a kernel elsewhere would read the old values."""
    arguments = operator.make("cuda")
    expected = flat(operator.call(*arguments, "both"))
    late = map_tensors(arguments, torch.zeros_like)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)

        def fill(value, source):
            if isinstance(value, torch.Tensor):
                value.copy_(source)
            elif isinstance(value, (list, tuple)):
                for v, s in zip(value, source, strict=True):
                    fill(v, s)

        fill(late, arguments)
        got = flat(operator.call(*late, "both"))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("axis", AXES)
def test_capture_and_replay_with_changed_inputs(operator, axis):
    arguments = operator.make("cuda")
    for _ in range(2):
        operator.call(*arguments, axis)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(operator.call(*arguments, axis))
    for factor in (1.0, -0.5):
        # float8 has no product of its own.
        map_tensors(arguments, lambda t, f=factor: t.copy_((t.float() * f).to(t.dtype)))
        graph.replay()
        torch.cuda.synchronize()
        fresh = flat(operator.call(*arguments, axis))
        assert all(torch.equal(a, b) for a, b in zip(captured, fresh, strict=True))


@pytest.mark.parametrize("axis", AXES)
def test_memory_around_the_inputs_is_never_read(operator, axis):
    def embed(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() != 2:
            return tensor
        rows, cols = tensor.shape
        # Rows stay on 16-byte borders if they were: 16 elements to the left, whole rows of 16.
        wide = -(-(cols + 32) // 16) * 16
        left, width = (16, wide) if cols % 16 == 0 else (3, cols + 9)
        big = torch.full((rows + 3, width), float("nan"), device="cuda").to(tensor.dtype)
        big[2 : 2 + rows, left : left + cols] = tensor
        return big[2 : 2 + rows, left : left + cols]

    arguments = operator.make("cuda")
    expected = flat(operator.call(*arguments, axis))
    got = flat(operator.call(*map_tensors(arguments, embed), axis))
    for a, b in zip(got, expected, strict=True):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_whole_tiles_of_the_pipeline_equal_the_oracle(paths):
    """Several whole tiles in every direction, and more tokens than the pipeline holds."""
    x, dy = torch.randn(5, 300, 1024), torch.randn(5, 300, 768)
    refs = [torch.randn(768, 1024).bfloat16().cuda() for _ in range(2)]
    x, dy = x.bfloat16().cuda(), dy.bfloat16().cuda()
    for axis in AXES:
        with paths:
            got = flat(wgrad_moments(x, dy, refs, axis))
        want = flat(reference.wgrad_moments(x, dy, refs, axis))
        scale = flat(reference.wgrad_moments(x.abs(), dy.abs(), [r.abs() for r in refs], axis))
        for a, b, s in zip(got, want, scale, strict=True):
            assert torch.all((a - b).abs() <= 16 * 2.0**-24 * s)


def test_more_than_2_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    rows, cols = 65_600, 32_800  # 2.15e9 elements
    if free < 3 * rows * cols * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    grad = torch.ones(rows, cols, dtype=torch.bfloat16, device="cuda")
    grad[-1, -1] = 3
    for axis in ("tensor", "both"):
        result = moments([grad], [[grad]], axis)
        part = result[0] if isinstance(result, tuple) else result
        assert part.sum[0].sum().item() == rows * cols + 2
        assert part.dots[0].sum().item() == rows * cols + 8


def test_a_wrong_device_is_named():
    grad = torch.ones(3, 4, device="cuda")
    with pytest.raises(ValueError, match=r"refs\[0\]\[0\] on cuda:0"):
        moments([grad], [[torch.ones(3, 4)]])

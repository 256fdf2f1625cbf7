"""The device code that kernels share (csrc/cuda/common), on the emulated grid."""

from __future__ import annotations

import pytest
import torch

from .emulator import BugFound, Case, buffer_of


def floats(output: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(output), dtype=torch.float32)


def ints(output: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(output), dtype=torch.int32)


@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 32])
def test_warp_sum_many(emulate, m):
    values = torch.randint(-100, 100, (32, m)).float()  # sums of integers are exact
    got = floats(emulate([Case(f"sum_many_{m}", buffers=[buffer_of(values)])])[0][0])
    assert torch.equal(got, values.sum(0).repeat_interleave(32 // m))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_product_fragments(emulate, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    name = "product_bf16" if dtype == torch.bfloat16 else "product_f16"
    outputs = emulate([Case(name, buffers=[buffer_of(t) for t in (a, b, c)])])[0]
    expected = (c.double() + a.double() @ b.double()).float().flatten()
    by_hand, by_ldmatrix = map(floats, outputs)
    assert torch.allclose(by_hand, expected, rtol=0, atol=1e-6)
    assert torch.equal(by_ldmatrix.view(2, -1), by_hand.expand(2, -1))


def test_tf32_product_fragments(emulate):
    """11 bits of each operand count, the lower ones are ignored; results are truncated."""
    a, bt, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    case = Case("product_tf32", buffers=[buffer_of(t) for t in (a, bt, c)])
    by_hand, by_ldmatrix = map(floats, emulate([case])[0])
    a, bt = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (a, bt))
    expected = (c.double() + a @ bt.T).flatten()
    assert torch.allclose(by_hand.double(), expected, rtol=2.0**-23, atol=1e-12)
    assert torch.all(by_hand.double().abs() <= expected.abs() * (1 + 1e-14))
    assert torch.equal(by_ldmatrix, by_hand)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix(emulate, n, transposed):
    matrices = torch.randint(0, 2**15, (n, 8, 8), dtype=torch.int16)
    name = f"ldmatrix_trans_{n}" if transposed else f"ldmatrix_{n}"
    got = ints(emulate([Case(name, buffers=[buffer_of(matrices)])])[0][0]).view(torch.int16)
    expected = matrices.transpose(1, 2) if transposed else matrices
    assert torch.equal(got, expected.flatten())  # lane l holds elements 2 l and 2 l + 1


def test_half_conversion(emulate):
    """All float16 values as the left factor of a product with the identity."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = torch.where(torch.isfinite(every), every, torch.zeros_like(every)).view(-1, 16, 16)
    eye, zeros = torch.eye(16, 8).half(), torch.zeros(16, 8)
    buffers = [[buffer_of(t) for t in (a.contiguous(), eye, zeros)] for a in every]
    outputs = emulate([Case("product_f16", buffers=b) for b in buffers], ["forward"])
    for a, output in zip(every, outputs, strict=True):
        assert torch.equal(floats(output[0]).view(16, 8), a[:, :8].float())


@pytest.mark.parametrize(("threads", "tiles", "count"), [(32, 3, 384), (64, 4, 1000), (96, 2, 0)])
def test_asynchronous_copies(emulate, threads, tiles, count):
    values = torch.randn(max(count, 4))
    case = Case("pipeline", [count, tiles, threads], [buffer_of(values)])
    got = floats(emulate([case])[0][0])
    assert torch.equal(got[:count], 2 * values[:count])
    assert torch.equal(got[count:], torch.zeros(len(got) - count))


def hasty_pipeline() -> Case:
    return Case("hasty_pipeline", [384, 3, 32], [buffer_of(torch.randn(384))])


def test_reading_a_copy_in_flight_is_reported(emulate):
    with pytest.raises(BugFound, match="copy is still in flight"):
        emulate([hasty_pipeline()])


def test_a_copy_in_flight_reads_as_nan(emulate_asan):
    assert floats(emulate_asan([hasty_pipeline()])[0][0]).isnan().any()


def test_shuffles_and_votes(emulate):
    values, lane = torch.randint(0, 50, (32,), dtype=torch.int32), torch.arange(32)
    case = Case("exchanges", buffers=[buffer_of(values)])
    got = ints(emulate([case])[0][0]).view(7, 32)
    up = torch.where(lane % 16 >= 3, lane - 3, lane)
    down = torch.where(lane + 5 < 32, lane + 5, lane)
    sources = [torch.full((32,), 5), lane // 8 * 8 + (lane + 3) % 8, up, down, lane ^ 9]
    for row, source in zip(got, sources, strict=False):
        assert torch.equal(row, values[source])
    votes = sum(int(v % 3 == 0) << i for i, v in enumerate(values.tolist()))
    assert got[5].tolist() == [votes - 2**32 if votes >= 2**31 else votes] * 32
    assert got[6, :12].tolist() == [2 + int((values[:12] == 7).any())] * 12
    assert torch.equal(got[6, 12:], values[lane[12:] ^ 1])


def test_the_last_block_may_read_what_others_wrote_before_their_fence(emulate):
    values, ticket = torch.randint(0, 9, (20,)).float(), torch.zeros(1, dtype=torch.int32)
    case = Case("last_block_sums", [5], [buffer_of(values), buffer_of(ticket)])
    outputs = emulate([case])[0]
    assert ints(outputs[0]).item() == 0  # back to zero for the next launch
    assert floats(outputs[1]).item() == values.sum()

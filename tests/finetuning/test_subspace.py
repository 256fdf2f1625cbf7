from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradsafe.finetuning import AlignmentSubspace

SHAPES = [(6, 5), (7,), (), (2, 3, 4)]


def gradients(count: int, dtype=torch.float32, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator).to(dtype) for s in SHAPES] for _ in range(count)]


def flat(tensors) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


def matrix(subspace: AlignmentSubspace) -> Tensor:
    k = len(subspace.direction)
    return torch.cat([b.double().reshape(k, -1) for b in subspace.basis], 1)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_vectors_are_the_first_singular_ones(rank):
    own = gradients(6)
    subspace = AlignmentSubspace.from_gradients(own, rank)
    rows = torch.stack([flat(g) for g in own])
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    found = matrix(subspace)
    # Each up to its sign.
    torch.testing.assert_close((found @ right[:rank].T).abs(), torch.eye(rank).double(),
                               rtol=0, atol=1e-5)  # fmt: skip
    torch.testing.assert_close(subspace.energy, (values**2 / (values**2).sum())[:rank])
    torch.testing.assert_close(subspace.direction, found @ rows.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_that_opposes_loses_its_part_in_the_subspace(dtype):
    own = gradients(5, dtype)
    subspace = AlignmentSubspace.from_gradients(own, 4)
    mean = [torch.stack(parts).mean(0) for parts in zip(*own, strict=True)]
    rest = gradients(1, dtype, 9)[0]
    user = [r - 3 * m for r, m in zip(rest, mean, strict=True)]
    before = flat(user)
    out = subspace.project_(user)
    assert out[0] < 0
    left = matrix(subspace) @ flat(user)
    assert left.norm() <= 8 * torch.finfo(dtype).eps * before.norm()
    kept = before - matrix(subspace).T @ (matrix(subspace) @ before)
    assert (flat(user) - kept).norm() <= 8 * torch.finfo(dtype).eps * before.norm()


def test_a_gradient_that_agrees_is_left_alone():
    own = gradients(5)
    subspace = AlignmentSubspace.from_gradients(own, 4)
    user = [g.clone() for g in own[0]]
    user = [u + m for u, m in zip(user, (sum(p) for p in zip(*own, strict=True)), strict=True)]
    before = [u.clone() for u in user]
    assert subspace.project_(user)[0] > 0
    assert all(map(torch.equal, user, before))


def test_vectors_that_are_not_orthonormal_are_refused():
    good = AlignmentSubspace.from_gradients(gradients(4), 2)
    for basis in ([2 * b for b in good.basis], [b[[0, 0]] for b in good.basis],
                  [b * torch.nan for b in good.basis]):  # fmt: skip
        with pytest.raises(ValueError, match=r"AlignmentSubspace: .*basis to be orthonormal"):
            AlignmentSubspace(basis, good.direction, good.energy)


def test_bad_input():
    own = gradients(4)
    with pytest.raises(ValueError, match="at least one gradient"):
        AlignmentSubspace.from_gradients([])
    for rank in (0, 5, True):
        with pytest.raises(ValueError, match="rank from 1 to 4 with 4 gradients"):
            AlignmentSubspace.from_gradients(own, rank)
    with pytest.raises(ValueError, match=r"gradients\[1\] of the shapes"):
        AlignmentSubspace.from_gradients([own[0], own[1][:2]], 1)
    own[2][0][0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite gradients"):
        AlignmentSubspace.from_gradients(own, 1)
    same = [gradients(1)[0]] * 4
    with pytest.raises(ValueError, match="span 3 dimensions, got 1"):
        AlignmentSubspace.from_gradients(same, 3)
    subspace = AlignmentSubspace.from_gradients(gradients(4), 2)
    with pytest.raises(ValueError, match=r"basis\[0\] of shape"):
        subspace.project_([torch.ones(3)] * 4)
    with pytest.raises(ValueError, match="basis to hold 1"):
        subspace.project_([torch.ones(6, 5)])


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vectors of torch\.float32, .*, got torch\.float64"):
        AlignmentSubspace.from_gradients([[torch.randn(4).double()] for _ in range(3)], 2)

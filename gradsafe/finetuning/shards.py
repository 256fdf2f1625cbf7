"""Surgery over several devices and shards: sums are added up before any gradient is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradsafe._checks import refuse
from gradsafe.ops import surgery_, surgery_merge_, surgery_sums


@dataclass
class Part:
    """Local tensors of one device that are sharded over the same process groups."""

    process_groups: list[Any]
    user: list[Tensor] = field(default_factory=list)
    align: list[Tensor] = field(default_factory=list)
    tests: list[int] = field(default_factory=list)

    def sums(self, count: int) -> Tensor:
        """Sums over all ranks, float64 `[count, 3]`; zeros for tests without a tensor here."""
        used = sorted(set(self.tests))
        place = {test: row for row, test in enumerate(used)}
        out = surgery_sums(self.user, self.align, [place[test] for test in self.tests])
        if len(used) < count:
            rows = torch.tensor(used, device=out.device)
            out = out.new_zeros(count, 3).index_copy_(0, rows, out)
        for group in self.process_groups:
            dist.all_reduce(out, group=group)
        return out


def split(user: Sequence[Tensor], align: Sequence[Tensor], tests: Sequence[int]) -> list[Part]:
    """Groups pairs of gradients by device and by the mesh dimensions that shard them."""
    parts: dict[Any, Part] = {}
    for index, (u, a, test) in enumerate(zip(user, align, tests, strict=True)):
        local_u, groups = local(f"user gradient {index}", u)
        local_a, other = local(f"alignment gradient {index}", a)
        if groups != other:
            found = [str(getattr(gradient, "placements", "one tensor")) for gradient in (u, a)]
            expected = f"both gradients of parameter {index} to be sharded alike"
            refuse("GradientSurgery", expected, " and ".join(found))
        part = parts.setdefault((local_u.device, tuple(map(id, groups))), Part(groups))
        part.user.append(local_u)
        part.align.append(local_a)
        part.tests.append(test)
    return list(parts.values())


def merge(parts: Sequence[Part], count: int, rho: float, projection: bool) -> Tensor:
    """Merges the parts of `split` in place, with `count` tests over all parts and ranks.

    Returns float64 `[count, 4]` (dot, sq_user, sq_align, coefficient) on the first part's device.
    """
    whole = len(parts) == 1 and not parts[0].process_groups
    if whole and projection:
        return surgery_(parts[0].user, parts[0].align, rho, parts[0].tests)
    total = parts[0].sums(count)
    for part in parts[1:]:
        total = total + part.sums(count).to(total.device)
    # Without projection: a dot product that is not negative is no conflict. NaN stays NaN.
    gate = total if projection else torch.cat([total[:, :1].clamp(min=0), total[:, 1:]], 1)
    for part in reversed(parts):
        sums = gate.to(part.user[0].device)
        results = surgery_merge_(part.user, part.align, sums, rho, part.tests)
    return torch.cat([total, results[:, 3:]], 1)


def local(name: str, gradient: Tensor) -> tuple[Tensor, list[Any]]:
    """This rank's shard of a gradient, and the process groups that hold the other shards."""
    mesh = getattr(gradient, "device_mesh", None)
    if mesh is None:
        return gradient, []
    shard: Any = gradient
    groups = []
    for dimension, placement in enumerate(shard.placements):
        if placement.is_partial():
            raise ValueError(
                f"gradsafe.GradientSurgery: {name} is a DTensor with an unreduced placement "
                f"{placement}; redistribute it to Shard or Replicate first"
            )
        if not placement.is_replicate():
            groups.append(mesh.get_group(dimension))
    return shard.to_local(), groups

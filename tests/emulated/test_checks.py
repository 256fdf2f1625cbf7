"""The emulated grid finds the classic mistakes: one small kernel each (csrc/tests/cases)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from .emulator import ROOT, BugFound, Case, buffer_of

# Whether a missing barrier shows as a race or as a read before the write depends on who runs first.
EITHER = r"(race|uninitialised): reads .*`first`"

# Fault of csrc/tests/cases/faulty.cu -> what the report must say.
FAULTS = {
    "kBarrierInBranches": r"divergent barrier: .* but thread 32 at that of",
    "kReturnBeforeBarrier": r"divergent barrier: .* thread 63 has left the kernel",
    "kShuffleInBranch": r"missing lanes: __shfl_xor_sync .* waits forever for lanes 0xffff0000",
    "kMasksDiffer": r"warp mask: .* has mask 0x\w+, lane \d+ has mask 0x\w+",
    "kNotInMask": r"warp mask: .* lacks the caller",
    "kNoSyncwarp": EITHER,
    "kNoBarrier": EITHER,
    "kNoBarrierBeforeReuse": r"race: \w+ .*`first`",
    "kBlocksShareResult": r"race: writes .* the output (.|\n)* of another block",
    "kTicketWithoutFence": r"race: reads .* the output (.|\n)* of another block",
    "kReadsBehindEnd": r"out of bounds: reads .* byte 256 of buffer 0",
    "kWritesBeforeStart": r"out of bounds: writes .* byte -4 of the output",
    "kMisaligned": r"misaligned: reads 16 bytes",
    "kWritesInput": r"written input",
    "kUnwrittenShared": r"uninitialised: reads .*`first`",
    "kUnwrittenOutput": r"uninitialised: reads .* the output",
    "kSharedOverflow": r"index \d+ out of bounds|out of bounds: writes",
    "kSharedOverflowOfOther": r"out of bounds: writes .* outside of this kernel's variables",
    "kDynamicOverflow": r"out of bounds: writes",
    "kCopyInFlight": r"uninitialised: .* copy is still in flight",
    "kCopyWithoutBarrier": EITHER,
    "kHostReadsDevice": r"host access",
    "kResultByArrival": r"order dependence: after .*faulty.*, the output differs",
}


def faulty(name: str) -> Case:
    source = Path(ROOT, "csrc/tests/cases/faulty.cu").read_text()
    listed = re.search(r"enum Fault \{(.*?)\}", source, re.DOTALL).group(1)
    names = [n.strip() for n in listed.split(",")]
    assert set(names) == {"kNone", *FAULTS, "kFaults"}
    ticket = torch.zeros(1, dtype=torch.int32)
    values = torch.arange(64, dtype=torch.float32)
    return Case("faulty", [names.index(name)], [buffer_of(values), buffer_of(ticket)])


def test_without_a_fault_nothing_is_reported(emulate):
    output = emulate([faulty("kNone")])[0][1]
    got = torch.frombuffer(bytearray(output), dtype=torch.float32)
    assert torch.equal(got, 2 * torch.arange(64).float().repeat(2))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(emulate, fault):
    with pytest.raises(BugFound, match=FAULTS[fault]) as caught:
        emulate([faulty(fault)])
    assert "faulty" in str(caught.value)  # the file, the kernel or the case

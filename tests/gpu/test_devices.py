"""First use inside a graph capture, and tensors on another device than the current one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradsafe import ops
from gradsafe.doctor_cases import CASES
from gradsafe.ops import _default as reference

pytestmark = pytest.mark.gpu
FIRST_USE = Path(__file__).parent / "first_use.py"


def test_first_use_of_every_operator_inside_a_graph_capture():
    """A fresh process: kernels are loaded, and given their shared memory, during the capture."""
    done = subprocess.run(
        [sys.executable, str(FIRST_USE)],
        env={**os.environ, "PYTHONPATH": str(FIRST_USE.parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split() == [
        "moments",
        "wgrad_moments",
        "grouped_wgrad_moments",
        "cosine_topk",
        "kl_divergence_",
        "surgery_",
        "surgery_adamw_",
        "subspace_surgery_",
    ]


@pytest.mark.parametrize("operator", list(CASES))
def test_tensors_on_another_device_than_the_current_one(operator):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    found = CASES[operator](ops, "cuda:1")
    here = CASES[operator](ops, "cuda:0")
    wanted = CASES[operator](reference, "cpu")
    assert torch.cuda.current_device() == 0
    for far, near, want in zip(found, here, wanted, strict=True):
        assert far.device.index == 1
        if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
            assert torch.equal(far.cpu(), near.cpu())
        assert (far.cpu().double() - want.double()).abs().max() <= 1e-5 * want.abs().max()


def test_arguments_on_two_gpus_are_refused():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with pytest.raises(ValueError, match=r"refs\[0\]\[0\] on cuda:0"):
        ops.moments([torch.ones(3, 4, device="cuda:0")], [[torch.ones(3, 4, device="cuda:1")]])

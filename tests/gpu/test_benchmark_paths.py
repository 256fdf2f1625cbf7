"""No benchmark times a path through the kernels that no comparison with the oracle took."""

from __future__ import annotations

import gc

import pytest
import torch
from paths import Paths, loads

from gradsafe._backend import _C
from gradsafe.ops import moments

pytestmark = pytest.mark.gpu
ORACLE_FILES = {
    "test_operators.py",
    "test_kl_cuda.py",
    "test_gpu_cosine_topk.py",
    "test_surgery_on_gpu.py",
}


def test_the_log_names_kernels_while_it_is_on():
    grad = torch.randn(8, 64, device="cuda")
    moments([grad])
    assert _C.launch_log() == []
    _C.set_launch_log(True)
    moments([grad])
    names = _C.launch_log()
    _C.set_launch_log(False)
    assert any("moments_tensor<" in name and "float" in name for name in names), names
    moments([grad])
    assert _C.launch_log() == []


def test_a_path_holds_alignment():
    grad = torch.randn(8, 65, device="cuda")
    seen = Paths()
    with seen:
        moments([grad])
        moments([grad[:, :64].contiguous()])
    assert len({path[:-1] for path in seen.taken}) == 2
    assert loads([grad]) == "float32 single"
    assert loads([grad], flat=True) == "float32 16 bytes"


def test_every_benchmark_takes_a_tested_path(paths, request):
    run = pytest.importorskip("benchmarks.run", reason="needs the repository's root on the path")
    ran = {item.path.name for item in request.session.items}
    options = request.config.option
    if not ran >= ORACLE_FILES or options.keyword or options.markexpr or not paths.taken:
        pytest.skip("compares with all tests of this folder, and they did not all run")
    timed = Paths()
    for operator in run.OPERATORS.values():
        for case in operator.gpu:
            plan = operator.build(case, "cuda")
            with timed:
                plan.calls["gradsafe"]()
            del plan
            gc.collect()
            torch.cuda.empty_cache()
    new = sorted(timed.taken - paths.taken)
    assert not new, "\n".join(" | ".join(path) for path in new)

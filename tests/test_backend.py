from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gradsafe._backend import _C, cuda_problem


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_current_stream_is_known_exactly_where_pytorch_has_cuda():
    assert _C.has_cuda_stream() == (torch.version.cuda is not None)


def test_the_build_says_what_it_holds():
    info = _C.build_info()
    assert info["torch_target"] == "2.10"
    assert bool(info["cuda_reason"]) != info["cuda"]
    if not info["cuda"]:
        assert "without CUDA kernels" in str(cuda_problem())


def test_cuda_kernels_are_registered_if_they_were_built():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in ("moments", "wgrad_moments", "cosine_topk"):
        assert has(f"gradsafe::{name}", "CPU")
        assert has(f"gradsafe::{name}", "CUDA") == _C.build_info()["cuda"]


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_the_instruction_set_can_be_forced(isa):
    done = run("from gradsafe._backend import _C; print(_C.cpu_isa())", GRADSAFE_FORCE_ISA=isa)
    if isa in _C.cpu_isas():
        assert done.stdout.strip() == isa
    else:
        assert done.returncode == 1
        assert "cannot run it" in done.stderr


def test_a_wrong_instruction_set_is_refused_at_import():
    done = run("import gradsafe.ops", GRADSAFE_FORCE_ISA="sse9")
    assert done.returncode == 1
    assert "GRADSAFE_FORCE_ISA=sse9: unknown instruction set" in done.stderr
    with pytest.raises(RuntimeError, match="unknown instruction set"):
        _C.set_cpu_isa("sse9")
    assert _C.cpu_isa() in _C.cpu_isas()


def test_importing_the_package_does_not_import_torch():
    done = run("import sys, gradsafe; print(sorted({'torch', 'transformers'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]"


def test_status_texts():
    assert _C.status_text(0) == "ok"
    assert "rebuild with GRADSAFE_CUDA_ARCHS" in _C.status_text(2)
    assert "unknown status" in _C.status_text(9)

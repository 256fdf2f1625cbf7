"""Which code a GPU runs is said before it fails, with a way out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gradsafe import _backend, doctor
from gradsafe._backend import _C
from gradsafe.device_code import device_code, driver_problem, version

USUAL = "80-real 86-real 89-real 90-real 100-real 120"


@pytest.mark.parametrize(
    ("archs", "capability", "text"),
    [
        (USUAL, (9, 0), "machine code for sm_90"),
        (USUAL, (8, 7), "machine code for sm_86, the same family"),
        ("80-real 90", (8, 9), "machine code for sm_80, the same family"),
        ("80-real;90", (10, 0), "PTX for compute_90, compiled when"),
        ("80-real 90", (12, 0), "PTX for compute_90, compiled when"),
        ("90a-real", (9, 0), "machine code for sm_90a"),
        ("100f-real", (10, 3), "machine code for sm_100f, the same family"),
        ("80-virtual", (8, 0), "PTX for compute_80"),
        ("native", (9, 0), "unknown: built for 'native'"),
    ],
)
def test_the_code_that_runs(archs, capability, text):
    code = device_code(archs, *capability)
    assert code.usable
    assert code.text.startswith(text)


@pytest.mark.parametrize(
    ("archs", "capability", "text"),
    [
        (USUAL, (7, 5), "none: sm_75 is older than sm_80, which the kernels need; move"),
        ("90-real", (8, 0), "nothing of it runs on sm_80; rebuild with GRADSAFE_CUDA_ARCHS=80-"),
        ("80-real 90-real", (12, 0), "rebuild with GRADSAFE_CUDA_ARCHS=120-real"),
        ("90a", (10, 0), "nothing of it runs on sm_100"),
        ("86-real", (8, 0), "nothing of it runs on sm_80"),
        ("", (9, 0), "GRADSAFE_CUDA_ARCHS=90-real"),
    ],
)
def test_no_code_that_runs(archs, capability, text):
    code = device_code(archs, *capability)
    assert not code.usable
    assert text in code.text


def test_a_driver_older_than_the_runtime_is_named(monkeypatch):
    assert driver_problem(12080, 13000).startswith("the GPU driver supports CUDA 12.8 and gradsafe")
    assert "nvcc of CUDA 12" in driver_problem(12080, 13000)
    for driver, runtime in ((13000, 13000), (13000, 13020), (13020, 12060), (0, 13000), (13000, 0)):
        assert driver_problem(driver, runtime) is None
    assert version(12080) == "12.8"
    backend = SimpleNamespace(
        build_info=lambda: {"cuda": True, "cuda_archs": "90"}, cuda_versions=lambda: (12040, 13000)
    )
    monkeypatch.setattr(_backend, "_C", backend)
    assert "supports CUDA 12.4" in _backend.cuda_problem()


def test_texts_of_the_launchers_name_the_way_out():
    assert "8.0 or later" in _C.status_text(2)
    assert "update the driver" in _C.status_text(3)
    assert "needs 114688 bytes of shared memory per block" in _C.status_text(4, 114688)


def test_versions_and_the_log_of_a_machine_without_a_gpu():
    driver, runtime = _C.cuda_versions()
    assert (runtime > 0) == _C.build_info()["cuda"]
    assert driver >= 0
    _C.set_launch_log(True)
    assert _C.launch_log() == []
    _C.set_launch_log(False)


def test_doctor_says_which_code_each_device_runs(monkeypatch):
    names = [("New GPU", 9, 0), ("Old GPU", 7, 5)]
    devices = [
        SimpleNamespace(name=n, major=a, minor=b, total_memory=80 << 30) for n, a, b in names
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
    of_build = doctor._devices
    monkeypatch.setattr(doctor, "_devices", lambda archs: of_build("80-real 90"))
    monkeypatch.setattr(doctor, "cuda_problem", lambda: None)
    monkeypatch.setattr(
        doctor, "_check", lambda operator, device, where: doctor.Check(where, True, 0)
    )
    checks = doctor.self_test()
    assert [c.name for c in checks if not c.ok] == ["operators on cuda:1"]
    assert "cuda:0" in {c.name for c in checks}
    report = doctor.render(doctor.examine())
    assert "New GPU (sm_90, 80 GiB)" in report
    assert "machine code for sm_90" in report
    assert "none: sm_75 is older than sm_80" in report

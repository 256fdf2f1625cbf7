"""Which device a process computes on; no GPU is touched."""

from __future__ import annotations

import pytest
import torch

from gradsafe._jobs import model


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Pretends that CUDA works; returns the devices made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(model, "cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_each_process_has_its_gpu(two_gpus: list[torch.device], device: str) -> None:
    assert model.choose_device(device, 1) == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own"):
        model.choose_device(device, 2)
    assert model.choose_device("cpu", 2) == torch.device("cpu")


def test_a_process_alone_takes_the_current_gpu(two_gpus: list[torch.device]) -> None:
    assert model.choose_device("auto") == torch.device("cuda")
    assert two_gpus == []


def test_an_idle_gpu_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "cuda_problem", lambda: "no kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="using the CPU: no kernels"):
        assert model.choose_device("auto") == torch.device("cpu")

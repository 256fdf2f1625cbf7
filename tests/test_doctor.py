"""The report names versions and reasons; the self-test notices a wrong operator."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

import gradsafe
from gradsafe import doctor, ops
from gradsafe._backend import _C
from gradsafe.ops import _default as reference


def operators() -> set[str]:
    """Functions of `gradsafe.ops` that `gradsafe.ops._default` defines too."""
    names = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    return {name for name in names if inspect.isfunction(getattr(reference, name, None))}


def test_every_operator_has_a_case() -> None:
    assert operators() == set(doctor.CASES)


def test_facts_name_versions_isa_cuda_and_threads() -> None:
    facts = doctor.collect()
    assert facts["versions"]["gradsafe"] == gradsafe.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["isa"] in facts["cpu"]["isa_available"]
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cuda"]["usable"] is (facts["cuda"]["problem"] is None)
    assert facts["cuda"]["usable"] is bool(facts["cuda"]["devices"])


def test_every_check_passes_on_every_instruction_set() -> None:
    before = _C.cpu_isa()
    checks = doctor.self_test()
    assert all(check.ok for check in checks), checks
    assert {f"moments on cpu/{isa}" for isa in _C.cpu_isas()} <= {check.name for check in checks}
    assert _C.cpu_isa() == before


def test_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run() == 0
    report = capsys.readouterr().out
    for word in ("gradsafe", "torch", "python", "CPU kernels", "CUDA device", "threads"):
        assert f"\n{word}" in f"\n{report}"
    assert report.count("  ok  ") == report.count(" on c") == len(doctor.self_test())
    assert max(len(line) for line in report.splitlines()) < 160


def test_report_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["checks"][0]["error"] < 1e-6


def test_forced_instruction_set_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSAFE_FORCE_ISA", "scalar")
    report = doctor.render({**doctor.collect(), "checks": []})
    assert "forced by GRADSAFE_FORCE_ISA=scalar" in report


class TestFailure:
    def wrong(self, monkeypatch: pytest.MonkeyPatch, change: object) -> list[doctor.Check]:
        monkeypatch.setattr(doctor, "CASES", {"moments": change})
        return doctor.self_test()

    def test_a_wrong_number_fails(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def case(module: object, device: str) -> list[torch.Tensor]:
            return [torch.ones(3) * (1.001 if module is ops else 1)]

        checks = self.wrong(monkeypatch, case)
        assert checks[0].error == pytest.approx(1e-3, rel=1e-3)
        assert doctor.run() == 1
        report = capsys.readouterr().out
        assert "FAIL  moments on cpu/" in report
        assert "more than 1e-05" in report
        assert f"0 of {len(checks)} checks passed" in report

    def test_nan_fails_and_stays_json(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def case(module: object, device: str) -> list[torch.Tensor]:
            return [torch.tensor([1.0, float("nan") if module is ops else 1.0])]

        assert self.wrong(monkeypatch, case)[0].detail == "the result is not finite"
        assert doctor.run(as_json=True) == 1
        assert "NaN" not in capsys.readouterr().out

    def test_an_exception_is_a_finding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def case(module: object, device: str) -> list[torch.Tensor]:
            raise RuntimeError("no kernel image")

        check = self.wrong(monkeypatch, case)[0]
        assert not check.ok
        assert check.detail == "RuntimeError: no kernel image"

    def test_two_calls_must_agree_to_the_bit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drift = iter(range(1000))

        def case(module: object, device: str) -> list[torch.Tensor]:
            return [torch.tensor([1 + 1e-6 * (next(drift) % 2 if module is ops else 0)])]

        assert {check.detail for check in self.wrong(monkeypatch, case)} == {"two calls disagree"}

"""The compiled emulator as fixtures; tests are skipped, visibly, where it cannot be built."""

from __future__ import annotations

import functools

import pytest

from . import emulator


def _program(flavour: str) -> emulator.Runner:
    if problem := emulator.compiler_problem():
        pytest.skip(problem)
    return functools.partial(emulator.run, emulator.build(flavour=flavour))


@pytest.fixture
def needs_a_compiler() -> None:
    """Skips where kernels cannot be compiled for the emulated grid."""
    if problem := emulator.compiler_problem():
        pytest.skip(problem)


@pytest.fixture(scope="session")
def emulate() -> emulator.Runner:
    """Runs cases with the emulator's own checks of every access."""
    return _program("checked")


@pytest.fixture(scope="session")
def emulate_asan() -> emulator.Runner:
    """Runs cases under AddressSanitizer."""
    if not emulator.compiler_problem() and not emulator.links_with("-fsanitize=address"):
        pytest.skip("this compiler has no AddressSanitizer")
    return _program("asan")

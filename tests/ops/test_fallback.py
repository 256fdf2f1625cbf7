"""Without the compiled module the operators are their plain definitions, announced once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradsafe._backend import _C
from gradsafe.ops import registry

HERE = Path(__file__).parent
MOMENTS = "import torch, gradsafe; print(gradsafe.ops.moments([torch.ones(2, 3)]).sum)"
# An import hook in place of a file that the loader refuses.
BROKEN = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "gradsafe._C":
            raise ImportError("undefined symbol: aoti_torch_x")
sys.meta_path.insert(0, Refuse())
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_schemas_are_those_of_the_compiled_module() -> None:
    source = (HERE.parents[1] / "csrc" / "torch" / "operators.cpp").read_text()
    calls = re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", source)
    compiled = {"".join(re.findall(r'"([^"]*)"', call)) for call in calls}
    assert set(registry.SCHEMAS.values()) == compiled
    for name in registry.SCHEMAS:
        assert getattr(torch.ops.gradsafe, name).default._schema.name == f"gradsafe::{name}"


@pytest.mark.skipif(_C is None, reason="the compiled module is not in use")
def test_the_methods_agree_with_the_compiled_module() -> None:
    script = str(HERE / "fallback_round.py")
    native, plain = run(script), run(script, GRADSAFE_BACKEND="default")
    assert plain.returncode == 0, plain.stderr
    expected, found = (json.loads(done.stdout.splitlines()[0]) for done in (native, plain))
    assert found["ids"] == expected["ids"]
    for name in ("scores", "hits", "merged"):
        torch.testing.assert_close(*(torch.tensor(f[name]) for f in (found, expected)))
    assert json.loads(native.stdout.splitlines()[1]) == []
    assert len(json.loads(plain.stdout.splitlines()[1])) == 1


def test_the_reason_is_announced_with_the_first_operator() -> None:
    done = run("-c", BROKEN + "import gradsafe, gradsafe.ops")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run("-c", BROKEN + MOMENTS)
    assert "tensor(6., dtype=torch.float64)" in done.stdout
    assert done.stderr.count("FallbackWarning: gradsafe: the operators run as") == 1
    assert "could not be loaded (undefined symbol: aoti_torch_x)" in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr


def test_strict_mode_forbids_it() -> None:
    done = run("-c", MOMENTS, GRADSAFE_BACKEND="default", GRADSAFE_STRICT="1")
    assert done.returncode == 1
    assert "RuntimeError: gradsafe: the operators run as their plain" in done.stderr
    assert "GRADSAFE_STRICT is set" in done.stderr


def test_an_unknown_backend_is_refused() -> None:
    done = run("-c", "import gradsafe.ops", GRADSAFE_BACKEND="fast")
    assert 'expected GRADSAFE_BACKEND="native" or "default"' in done.stderr


def test_doctor_shows_it() -> None:
    done = run("-c", BROKEN + "from gradsafe import doctor; raise SystemExit(doctor.run())")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"operators +plain PyTorch definitions \(slow\): the compiled", done.stdout)
    assert "undefined symbol" in done.stdout
    assert "11 of 11 checks passed" in done.stdout
    done = run("-m", "gradsafe", "doctor", "--json", GRADSAFE_BACKEND="default")
    assert json.loads(done.stdout)["fallback"] == "GRADSAFE_BACKEND=default is set"


@pytest.mark.slow
def test_checks_fake_kernels_and_autograd_stay() -> None:
    """The tests of the operators themselves, on the plain definitions."""
    chosen = "opcheck or compiles or bad_arguments or differentiable or gradient or empty or share"
    native_only = "memory or no_buffer or checks_again or vector or threads or 1e+25 or 1e+30"
    done = run(
        *("-m", "pytest", "-q", "-x", str(HERE), "-k", f"({chosen}) and not ({native_only})"),
        *("--deselect", str(HERE / "test_fallback.py")),
        GRADSAFE_BACKEND="default",
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout

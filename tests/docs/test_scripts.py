"""Every script of examples/ runs on a tiny model, in a process of its own and without network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [p.stem for p in sorted((ROOT / "examples").glob("*.py")) if p.stem != "loading"]
# A line that a script must print.
PRINTED = {
    "cost": "both references",
    "custom_training_loop": "cosine",
    "detect_with_calibration": "threshold",
    "hidden_correction": "corrected",
    "operators": "kl_divergence_",
    "trace_and_repair": "5 of 5 planted ones",
    "trl_recipe": "safegrad/cosine",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--tiny"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert PRINTED[script] in result.stdout

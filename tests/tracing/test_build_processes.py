"""`TraceIndex.build` inside a process group; the command under torchrun is in tests/cli."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trace_samples import EXAMPLES, build, files

import gradsafe
from gradsafe._io.processes import Processes

SCRIPT = Path(__file__).with_name("build_in_group.py")


def two(folder: Path, what: str) -> list[str]:
    """What each of two processes says in the end."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = f"{Path(gradsafe.__file__).parents[1]}:{SCRIPT.parents[1]}"
    done = subprocess.run(
        [*start, str(SCRIPT), str(folder), what],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [(folder / f"said-{rank}.txt").read_text() for rank in range(2)]


@pytest.mark.slow
def test_a_group_builds_and_extends_the_index_of_one_process(
    model, tokenizer, tmp_path, one_thread
):
    said = two(tmp_path, "build")
    whole = build(model, tokenizer, tmp_path / "whole", EXAMPLES[:16], layer="auto")
    whole.extend(EXAMPLES[16:], batch_tokens=200, progress=False)
    assert files(tmp_path / "index") == files(whole.path)
    assert said == [f"23 at layer {whole.layer}: [['s3']]"] * 2


@pytest.mark.slow
def test_where_one_fails_the_other_says_why(tmp_path):
    assert two(tmp_path, "fail") == [
        "Stopped: process 1 failed: ValueError: s1 does not fit",
        "ValueError: s1 does not fit",
    ]


@pytest.mark.slow
def test_other_samples_in_one_process_are_refused(tmp_path):
    first, second = two(tmp_path, "differ")
    assert second.startswith("ValueError: gradsafe.TraceIndex: expected the examples of process 0")
    assert first == f"Stopped: process 1 failed: {second}"


def test_several_processes_need_a_path(model, tokenizer):
    with pytest.raises(ValueError, match="several processes need a path"):
        build(model, tokenizer, None, processes=Processes(0, 2))

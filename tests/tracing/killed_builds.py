"""Builds one index undisturbed and one that is killed ten times: killed_builds.py FOLDER SEED.

Moments are CPU time of the build, so that a busy machine does not move them.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from builders import make_model, make_tokenizer
from trace_samples import build

KILLS = 10
ROWS = [{"prompt": "why " * (i % 9) + f"{i}", "response": f"so {i * i}"} for i in range(900)]


def start(path: Path) -> int:
    """A process that builds."""
    if pid := os.fork():
        return pid
    try:
        build(model, tokenizer, path, ROWS, layer=1, batch_tokens=150, shard_samples=30)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finish(pid: int) -> float:
    """CPU seconds of a build that must succeed."""
    _, status, usage = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_utime + usage.ru_stime


def kill_at(pid: int, moment: float) -> int:
    """Exit status of a build that is killed after so many CPU seconds, or ended before."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) >= moment * 1e9:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.0005)


torch.set_num_threads(1)  # none but this thread runs when it forks
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
model = make_model("llama", vocab_size=300, max_position_embeddings=96).eval()
tokenizer = make_tokenizer()
build(
    model, tokenizer, None, ROWS[:9], layer=1
)  # what the first call loads is no moment to kill at
total = finish(start(folder / "whole"))
rng = random.Random(seed)
progress = []
for _ in range(KILLS):
    status = kill_at(start(folder / "killed"), rng.uniform(0, total / 8))
    assert status == -signal.SIGKILL, f"the build ended with {status} before its moment"
    progress.append(len(list((folder / "killed").glob("shard-*.safetensors"))))
finish(start(folder / "killed"))
print(f"{total:.2f} s; shards after each kill: {progress}")
assert len({*progress}) > 4

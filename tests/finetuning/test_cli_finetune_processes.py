"""`gradsafe finetune` and `repair` under torchrun: the weights of one process, reported once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_inputs import write_inputs
from safetensors.torch import load_file

import gradsafe
from gradsafe._cli import main

pytestmark = pytest.mark.slow
# A model in DDP that outlives the process group can hang the process when it is freed.
CHECKED = """
import gc, sys
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from gradsafe._cli import main

def destroy(*args):
    alive = [o for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]
    sys.stderr.write(f"models in DDP at the end: {len(alive)}\\n")
    whole(*args)

whole, distributed.destroy_process_group = distributed.destroy_process_group, destroy
sys.exit(main())
"""


def write_settings(output: str, batch: int, **training: Any) -> None:
    settings = {
        "model": "model",
        "train": "user.jsonl",
        "alignment": "refusals.jsonl",
        "output": output,
        "device": "cpu",
        "full": True,
        "safegrad": {"loss": "sft"},
        "training": {
            "per_device_train_batch_size": batch,
            "max_steps": 6,
            "learning_rate": 0.1,
            "optim": "sgd",
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 1,
            **training,
        },
    }
    Path(f"{output}.yaml").write_text(yaml.safe_dump(settings))


def torchrun(output: str, *options: str, job: str = "finetune") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(gradsafe.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    Path("checked.py").write_text(CHECKED)
    command = ["checked.py", job, "--config", f"{output}.yaml", "--no-progress"]
    return subprocess.run(
        [*start, *command, *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(8)


def difference(one: str, other: str) -> float:
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.usefixtures("one_thread")
def test_two_write_the_weights_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    write_settings("one", batch=4)
    write_settings("two", batch=2)
    assert main(["finetune", "--config", "one.yaml", "--no-progress"]) == 0
    done = torchrun("two")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("models in DDP at the end: 0") == 2
    assert difference("one", "model") > 1e-2
    assert difference("one", "two") < 1e-6
    assert done.stdout.count("6 steps, mean logged cosine") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert done.stdout.splitlines()[-1] == last.replace("written to one", "written to two")

    # Both see that the folder is in use, one says so.
    done = torchrun("two")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("gradsafe: ")]
    assert said == ["gradsafe: error: two is not empty: choose --resume or another output"]

    (Path("two") / "model.safetensors").rename("whole.safetensors")
    for path in Path("two").glob("checkpoint-6/*"):
        path.unlink()
    Path("two/checkpoint-6").rmdir()
    done = torchrun("two", "--resume")
    assert done.returncode == 0, done.stderr
    again, whole = load_file("two/model.safetensors"), load_file("whole.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.usefixtures("one_thread")
def test_two_repair_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    for output, batch in (("one", 4), ("two", 2)):
        write_settings(output, batch, max_steps=4)
        settings = yaml.safe_load(Path(f"{output}.yaml").read_text())
        del settings["train"], settings["alignment"]
        settings |= {"rows": "user.jsonl", "drop": "1,2,4,6", "retain": "refusals.jsonl"}
        Path(f"{output}.yaml").write_text(yaml.safe_dump({**settings, "how": "npo"}))
    assert main(["repair", "--config", "one.yaml", "--no-progress"]) == 0
    done = torchrun("two", job="repair")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("models in DDP at the end: 0") == 2
    assert difference("one", "model") > 1e-2
    assert difference("one", "two") < 1e-6
    last = capsys.readouterr().out.splitlines()[-1]
    assert done.stdout.splitlines()[-1] == last.replace("written to one", "written to two")


def test_shards_on_the_cpu_are_refused_once() -> None:
    write_settings("two", batch=2, fsdp=True)
    done = torchrun("two")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("gradsafe: ")]
    assert len(said) == 1
    assert "accelerate shards no model on the CPU" in said[0]

"""The GPU run on a CPU: whoever kills it at any moment loses the running step and nothing else."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "benchmarks" / "gpu"
# Steps that write a table and end, but one that stays until it is killed.
STUBS = """
import sys
sys.path.insert(0, {driver!r})
import drive
from steps import Step
NAMES = ("first", "second", "third")
def step(name):
    write = f"open(sys.argv[1] + '/t.csv', 'w').write('case,p50_us\\\\n{{name}},1\\\\n')"
    code = f"import sys; {{write}}; {{'import time; time.sleep(60)' if name == {slow!r} else ''}}"
    return Step(name, 70, (), ("-c", code, "{{out}}"))
drive.STEPS = tuple(step(name) for name in NAMES)
drive.check_machine = lambda dry: {{}}
drive.REFRESH = 0.2
raise SystemExit(drive.main(sys.argv[1:]))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A dry run with a folder of its own and a stand-in for nvidia-smi."""
    stand_in = tmp_path / "bin" / "nvidia-smi"
    stand_in.parent.mkdir()
    stand_in.write_text("#!/bin/sh\necho 'Stand-in GPU, 999.1, 80000 MiB, 9.0'\n")
    stand_in.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
        "DRY_RUN": "1",
        "PYTHON": sys.executable,
        "GRADSAFE_COMMIT": "abc1234",
        "GRADSAFE_GPU_WORK": str(tmp_path / "work"),
    }


def archived(out: Path) -> dict[str, str]:
    with tarfile.open(out / "results.tar.gz") as tar:
        files = {m.name.removeprefix("gpu_run/"): tar.extractfile(m) for m in tar.getmembers()}
        return {name: file.read().decode() for name, file in files.items() if file}


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run did not come so far"
        time.sleep(0.05)


@pytest.mark.parametrize("slow", ["first", "second", "third"])
def test_a_kill_loses_the_running_step_only(slow, environment, tmp_path):
    out, names = tmp_path / "out", ["first", "second", "third"]
    before = names[: names.index(slow)]

    def start(slow: str, *options: str) -> subprocess.Popen[str]:
        code = STUBS.format(driver=str(DRIVER), slow=slow, name=slow)
        return subprocess.Popen(
            [sys.executable, "-c", code, str(out), *options],
            env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    run = start(slow)
    wait_for(lambda: (out / "results.tar.gz").exists() and f"{slow}/t.csv" in archived(out))
    run.send_signal(signal.SIGKILL)
    run.communicate()
    kept = archived(out)
    assert [name for name in names if f"{name}/done.json" in kept] == before
    for name in [*before, slow]:  # rows of the killed step, too, as far as it came
        assert kept[f"{name}/t.csv"] == f"case,p50_us\n{name},1\n"
    assert (out / "report.txt").exists() == bool(before)

    again = start("", "--skip-done")
    printed, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert [line[4:] for line in printed.splitlines() if line.startswith("=== ")] == [
        *names[len(before) :],
        "summary",
    ]
    assert all(f"{name}/done.json" in archived(out) for name in names)
    assert len(list(out.iterdir())) <= 8


def test_a_step_dies_with_the_run(environment, tmp_path):
    code = STUBS.format(driver=str(DRIVER), slow="first", name="first")
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], env=environment)
    wait_for((tmp_path / "work" / "first" / "t.csv").exists)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    if not children.exists():
        pytest.skip("this kernel does not list children")
    (timeout,) = children.read_text().split()
    run.kill()
    run.wait()

    def gone() -> bool:
        try:
            return Path(f"/proc/{timeout}/stat").read_text().split()[2] == "Z"
        except OSError:
            return True

    wait_for(gone)


@pytest.mark.slow
def test_measured_rows_survive_a_kill_of_the_benchmark(environment, tmp_path):
    """The real script on tiny shapes: killed after a row, it goes on with the next case."""
    command = [
        "bash", str(DRIVER / "run.sh"), str(tmp_path / "out"), "--only", "wgrad", "--skip-done",
    ]  # fmt: skip
    table = tmp_path / "work" / "wgrad" / "wgrad_moments_cpu.csv"
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    wait_for(table.exists, 120)
    run.kill()
    run.wait()
    kept = list(csv.DictReader(io.StringIO(table.read_text())))
    assert kept
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "GPU: Stand-in GPU, 999.1" in done.stdout
    rows = list(csv.DictReader(io.StringIO(archived(tmp_path / "out")[f"wgrad/{table.name}"])))
    assert rows[: len(kept)] == kept
    assert len(rows) == 7
    for row in rows:
        assert float(row["checked"]) <= 1
        assert float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert all(float(row[f"{name}_p50_us"]) > 0 for name in ("gemm", "eager"))


def test_a_machine_that_lacks_something_is_refused_at_once(environment, tmp_path):
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    done = subprocess.run(
        ["bash", str(DRIVER / "run.sh"), str(tmp_path / "out")],
        env={**environment, "DRY_RUN": ""}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "missing on PATH: " in done.stderr
    assert "nvidia-smi" in done.stderr


def test_an_unknown_step_is_named(environment, tmp_path):
    done = subprocess.run(
        ["bash", str(DRIVER / "run.sh"), str(tmp_path / "out"), "--only", "wgrad,nothing"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "unknown steps ['nothing']" in done.stderr

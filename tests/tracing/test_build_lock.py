"""Two builds in one folder at once: the second is refused, and the dead hold nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trace_samples import EXAMPLES, build, files

from gradsafe import TraceIndex
from gradsafe._io.processes import Processes
from gradsafe.models import ContextOverflowError
from gradsafe.tracing import BusyFolderError
from gradsafe.tracing.lock import LOCK, building_alone

HOLDER = """
import sys, time
from pathlib import Path
from gradsafe._io.processes import Processes
from gradsafe.tracing.lock import building_alone
with building_alone(Path(sys.argv[1]), Processes()):
    print("held", flush=True)
    time.sleep(600)
"""


def alone(folder: Path):
    return building_alone(folder, Processes())


@pytest.fixture
def index(model, tokenizer, tmp_path):
    return build(model, tokenizer, tmp_path / "index", EXAMPLES[:8])


def test_nothing_is_changed_while_another_build_works(model, tokenizer, index):
    before = files(index.path)
    with alone(index.path):
        for call in (
            lambda: build(model, tokenizer, index.path, EXAMPLES[:8]),
            lambda: index.extend(EXAMPLES[8:], progress=False),
            lambda: TraceIndex.repair(index.path),
        ):
            with pytest.raises(BusyFolderError, match=f"another build uses {index.path}"):
                call()
        assert index.query(EXAMPLES[3], 1).ids == [["s3"]]
        assert len(TraceIndex.load(index.path, model, tokenizer)) == 8
    assert files(index.path) == before
    index.extend(EXAMPLES[8:], progress=False)
    assert len(index) == 23


def test_an_index_that_grew_meanwhile_is_read_anew(model, tokenizer, index):
    other = TraceIndex.load(index.path, model, tokenizer)
    index.extend(EXAMPLES[8:12], progress=False)
    with pytest.raises(ValueError, match="id 's9' already belongs to the index"):
        other.extend(EXAMPLES[9:14], progress=False)
    other.extend(EXAMPLES[12:], progress=False)
    assert other.ids == [row["id"] for row in EXAMPLES]
    assert len(TraceIndex.load(index.path, model, tokenizer)) == 23


def test_the_dead_hold_nothing(model, tokenizer, tmp_path):
    folder = tmp_path / "index"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyFolderError):
            build(model, tokenizer, folder)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert (folder / LOCK).exists()
    whole = build(model, tokenizer, tmp_path / "whole")
    assert files(build(model, tokenizer, folder).path) == files(whole.path)


def test_a_job_shares_the_folder_to_its_last_process(tmp_path):
    class Second(Processes):
        """Beside a first process that holds the folder already."""

        def wait(self, name, tick=None):
            pass

        leave = wait

    folder = tmp_path / "index"
    first, second = alone(folder), building_alone(folder, Second(1, 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(BusyFolderError), alone(folder):
        pytest.fail("the second process is still there")
    second.__exit__(None, None, None)
    with alone(folder):
        pass


def test_a_lock_that_was_removed_in_between_is_taken_again(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    folder.mkdir()
    flock, removed = fcntl.flock, []

    def removing(file, kind):
        if not removed:
            removed.append((folder / LOCK).unlink())
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", removing)
    with alone(folder), pytest.raises(BusyFolderError), alone(folder):
        pytest.fail("held twice")
    assert removed
    assert not list(folder.iterdir())


def test_a_build_that_fails_at_once_leaves_no_folder(model, tokenizer, tmp_path):
    with pytest.raises(ContextOverflowError):  # of the first probe
        build(
            model,
            tokenizer,
            tmp_path / "index",
            [{"prompt": "a" * 100, "response": "b"}],
            layer="auto",
        )
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def refuse(file, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        OSError, match=r"cannot lock .*No locks available.*copy the index"
    ) as caught:
        alone(tmp_path / "index").__enter__()
    assert not isinstance(caught.value, BusyFolderError)

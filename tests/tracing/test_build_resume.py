"""A build that was killed goes on and ends with the same bytes; a full disk spoils nothing."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from builders import make_tokenizer
from safetensors import SafetensorError
from trace_samples import EXAMPLES, QUERIES, build, files

import gradsafe
from gradsafe import TraceIndex
from gradsafe._io import artifacts
from gradsafe.tracing import IncompleteIndexWarning, folder
from gradsafe.tracing.signature import SignaturePass

HERE = Path(__file__).parent
CHILD = """
    import os, signal, sys
    sys.path[:0] = {paths!r}
    from builders import make_model, make_tokenizer
    from trace_samples import EXAMPLES, QUERIES, build, files
    model = make_model("llama", vocab_size=300, max_position_embeddings=96).eval()
    # Every step that touches the disk is a moment to die at: before it and after it.
    left = int(sys.argv[2])
    def dying(step):
        def run(*args, **options):
            global left
            for half in range(2):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                if half == 0:
                    result = step(*args, **options)
            return result
        return run
    import safetensors.torch
    from gradsafe._io import artifacts
    from pathlib import Path
    os.replace = dying(os.replace)
    safetensors.torch.save_file = dying(safetensors.torch.save_file)
    artifacts.flush_to_disk = dying(artifacts.flush_to_disk)
    Path.write_text = dying(Path.write_text)
    build(model, make_tokenizer(), sys.argv[1])
"""


class Stop(BaseException):
    pass


def interrupt(monkeypatch, after: int) -> list[int]:
    """Lets `after` batches pass, then raises; returns the batch sizes that were computed."""
    computed: list[int] = []
    batch = SignaturePass.batch

    def counted(self, items):
        if len(computed) == after:
            raise Stop
        computed.append(len(items))
        return batch(self, items)

    monkeypatch.setattr(SignaturePass, "batch", counted)
    return computed


def test_every_batch_is_a_place_to_stop_and_none_is_computed_twice(
    model,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    with monkeypatch.context() as patch:
        computed = interrupt(patch, -1)
        whole = build(model, tokenizer, tmp_path / "whole", batch_tokens=100)
    batches = list(computed)
    assert len(batches) > 6
    assert sum(batches) == len(EXAMPLES)
    for stop in range(len(batches)):
        path = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            before = interrupt(patch, stop)
            with pytest.raises(Stop):
                build(model, tokenizer, path, batch_tokens=100)
        with monkeypatch.context() as patch:
            after = interrupt(patch, -1)
            build(model, tokenizer, path, batch_tokens=100)
        assert before + after == batches
        assert files(path) == files(whole.path)


@pytest.mark.parametrize("seed", range(2))
def test_a_build_killed_at_random_moments_ends_with_the_same_bytes(
    model,
    tokenizer,
    tmp_path,
    seed,
):
    whole = build(model, tokenizer, tmp_path / "whole")
    code = textwrap.dedent(CHILD).format(paths=[str(HERE), str(HERE.parent)])
    moment = random.Random(seed).randrange(8, 60)
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "killed"), str(moment)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert files_or_none(tmp_path / "killed") != files(whole.path)
    build(model, tokenizer, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(whole.path)


@pytest.mark.slow
def test_a_build_killed_ten_times_over_ends_with_the_same_bytes(tmp_path):
    run = subprocess.run(
        [sys.executable, str(HERE / "killed_builds.py"), str(tmp_path), "0"],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{Path(gradsafe.__file__).parents[1]}:{HERE.parent}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    whole = files(tmp_path / "whole")
    assert len(whole) == 31
    assert files(tmp_path / "killed") == whole


def files_or_none(path: Path) -> dict[str, bytes] | None:
    return (
        {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()} if path.is_dir() else None
    )


def test_death_at_any_step_of_the_disk_is_survived(
    model,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    """The moments of the test above, one by one, with an exception that nothing catches."""
    whole = build(model, tokenizer, tmp_path / "whole")
    died = 0
    for moment in range(0, 1000, 3):
        path = tmp_path / f"at{moment}"
        with monkeypatch.context() as patch:
            left = [moment]

            def dying(step, left=left):
                def run(*args, **options):
                    if left[0] <= 0:
                        raise Stop
                    left[0] -= 1
                    return step(*args, **options)

                return run

            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(safetensors.torch, "save_file", dying(safetensors.torch.save_file))
            patch.setattr(artifacts, "flush_to_disk", dying(artifacts.flush_to_disk))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            patch.setattr(folder.shutil, "rmtree", dying(folder.shutil.rmtree))
            try:
                build(model, tokenizer, path)
            except Stop:
                died += 1
            else:
                break
        build(model, tokenizer, path)
        assert files(path) == files(whole.path), moment
    assert died > 5


def test_a_torn_batch_file_is_computed_again(
    model,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    whole = build(model, tokenizer, tmp_path / "whole", batch_tokens=100)
    for damage in ("cut", "flip", "foreign"):
        path = tmp_path / damage
        with monkeypatch.context() as patch:
            interrupt(patch, 2)
            with pytest.raises(Stop):
                build(model, tokenizer, path, batch_tokens=100)
        first, second = sorted(path.glob(".work-*/*.safetensors"))
        data = bytearray(first.read_bytes())
        if damage == "cut":
            first.write_bytes(data[:-5])
        elif damage == "flip":
            data[-2] ^= 1
            first.write_bytes(data)
        else:
            first.write_bytes(second.read_bytes())
        build(model, tokenizer, path, batch_tokens=100)
        assert files(path) == files(whole.path)


def test_another_batch_size_may_finish_a_build(
    model,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    whole = build(model, tokenizer, tmp_path / "whole", batch_tokens=100)
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(Stop):
            build(model, tokenizer, tmp_path / "a", batch_tokens=100)
    index = build(model, tokenizer, tmp_path / "a", batch_tokens=60)
    a, b = index.query(QUERIES, 23), whole.query(QUERIES, 23)
    assert a.ids == b.ids
    assert (a.scores - b.scores).abs().max() < 1e-5


def test_what_safetensors_left_behind_is_removed(model, tokenizer, tmp_path):
    """A process that is killed inside `save_file` leaves a file with a name of its own."""
    build(model, tokenizer, tmp_path / "whole")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tmpA1b2C3").write_bytes(b"half")
    build(model, tokenizer, tmp_path / "a")
    assert files(tmp_path / "a") == files(tmp_path / "whole")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("full")])
def test_a_full_disk_leaves_a_valid_index(
    model,
    tokenizer,
    tmp_path,
    monkeypatch,
    error,
):
    whole = build(model, tokenizer, tmp_path / "whole")
    save = safetensors.torch.save_file

    def full(tensors, path, note=None):
        if "shard-000001" in path.name:
            Path(path).write_bytes(b"half")
            raise error
        save(tensors, path, note)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match=r"space|cannot write"):
            build(model, tokenizer, tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.partial"))
    with pytest.warns(IncompleteIndexWarning, match="has 8 of 23 samples"):
        part = TraceIndex.load(tmp_path / "a", model, tokenizer)
    assert part.query([EXAMPLES[3]], 1).ids == [["s3"]]
    build(model, tokenizer, tmp_path / "a")
    assert files(tmp_path / "a") == files(whole.path)


@pytest.mark.parametrize("size", [100, 1100, 3000])
def test_a_disk_that_takes_no_more_than_so_many_bytes_of_a_file(model, tokenizer, tmp_path, size):
    """The kernel refuses here, at the manifest, at a batch or at a shard."""
    whole = build(model, tokenizer, tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            build(model, tokenizer, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if (tmp_path / "a" / "manifest.json").exists():
        with pytest.warns(IncompleteIndexWarning, match="of 23 samples"):
            TraceIndex.load(tmp_path / "a", model, tokenizer)
    build(model, tokenizer, tmp_path / "a")
    assert files(tmp_path / "a") == files(whole.path)


def test_a_killed_extension_goes_on(model, tokenizer, tmp_path, monkeypatch):
    index = build(model, tokenizer, tmp_path / "a", EXAMPLES[:8])
    whole = build(model, tokenizer, tmp_path / "b", EXAMPLES[:8])
    whole.extend(EXAMPLES[8:], batch_tokens=100, progress=False)
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(Stop):
            index.extend(EXAMPLES[8:], batch_tokens=100, progress=False)
    with pytest.warns(IncompleteIndexWarning):
        index = TraceIndex.load(tmp_path / "a", model, tokenizer)
    index.extend(EXAMPLES[8:], batch_tokens=100, progress=False)
    assert files(index.path) == files(whole.path)
    assert index.ids == whole.ids


def test_a_resumed_build_says_what_it_lacks(
    model,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    with monkeypatch.context() as patch:
        interrupt(patch, 0)
        with pytest.raises(Stop):
            build(model, tokenizer, tmp_path / "a")
    with pytest.warns(IncompleteIndexWarning, match="has 0 of 23"):
        empty = TraceIndex.load(tmp_path / "a", model, make_tokenizer())
    with pytest.raises(ValueError, match="has no complete sample yet: finish its build"):
        empty.query(QUERIES, 1)

"""Damaged and forged files are refused with a StorageError, or change nothing."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from gradsafe import Detector, TraceIndex
from gradsafe._io.artifacts import (
    MANIFEST,
    TENSORS,
    StorageError,
    load_folder,
    save_folder,
    write_manifest,
)

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["what is that?", "abc " * 5, "no"]
ROWS = [{"prompt": f"ask {i}", "response": f"say {i * i}"} for i in range(7)]
QUERY = {"prompt": "ask 3", "response": "say 9"}
STRANGE = (None, True, "x", -1, 0, 2**70, 1e300, [], {}, [[]], {"a": 1})

Use = Callable[[Path], Any]


@pytest.fixture(scope="module")
def detector(model, tokenizer, tmp_path_factory) -> tuple[Path, Use]:
    folder = tmp_path_factory.mktemp("saved") / "detector"
    fitted = Detector.fit(model, tokenizer, ["a b"], ["c d"], row_fraction=0.5, progress=False)
    fitted.calibrate([f"number {i}" for i in range(5)], max_fpr=0.2, progress=False)
    fitted.save(folder)

    def use(path: Path) -> Any:
        found = Detector.load(path, model, tokenizer)
        return found.score(PROMPTS, progress=False).values.tolist(), found.threshold

    return folder, use


@pytest.fixture(scope="module")
def index(model, tokenizer, tmp_path_factory) -> tuple[Path, Use]:
    folder = tmp_path_factory.mktemp("saved") / "index"
    TraceIndex.build(model, tokenizer, ROWS, folder, shard_samples=4, progress=False)

    def use(path: Path) -> Any:
        hits = TraceIndex.load(path, model, tokenizer).query(QUERY, k=3)
        return hits.ids, hits.scores.tolist()

    return folder, use


@pytest.fixture(params=["detector", "index"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Use, Any]:
    """A copy of a folder, what reads it, and what an undamaged one gives."""
    folder, use = request.getfixturevalue(request.param)
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", use, use(folder)


def test_every_flipped_byte_of_a_manifest_is_refused_or_harmless(saved) -> None:
    folder, use, expected = saved
    path = folder / MANIFEST
    whole = path.read_bytes()
    accepted = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = use(folder)
        except StorageError:
            continue
        accepted += 1
        assert found == expected, place
    assert accepted < len(whole) / 2  # white space between the values


def test_flipped_bytes_and_cuts_of_other_files_are_refused(saved) -> None:
    folder, use, _ = saved
    for path in folder.glob("*.safetensors"):
        whole = path.read_bytes()
        for place in (*range(0, 300, 7), *range(300, len(whole), len(whole) // 40)):
            damaged = bytearray(whole)
            damaged[place] ^= 16
            path.write_bytes(damaged)
            with pytest.raises(StorageError, match=path.name):
                use(folder)
        for size in (0, 1, 7, 8, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(StorageError, match=path.name):
                use(folder)
        path.write_bytes(whole)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for key, inner in enumerate(value):
            yield from places(inner, (*path, key))


def test_forged_values_are_refused_or_harmless(saved) -> None:
    """The digest is right: whoever forged the file knows how it is computed."""
    folder, use, _ = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    refused = 0
    for place in places(manifest["metadata"]):
        for value in (*STRANGE, KeyError):
            forged = copy.deepcopy(manifest["metadata"])
            entry = forged
            for key in place[:-1]:
                entry = entry[key]
            if value is KeyError:
                del entry[place[-1]]
            else:
                entry[place[-1]] = value
            write_manifest(folder, manifest["kind"], forged, manifest["files"])
            with suppress(ValueError):  # StorageError, or another model
                use(folder)
                continue
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unsafe/sums", lambda t: t * torch.nan),
        ("unsafe/sums", lambda t: t * 0),
        ("unsafe/sums", lambda t: -t),
        ("unsafe/sums", lambda t: t[:-1]),
        ("unsafe/sums", lambda t: t.float()),
        ("safe/weights/model.layers.0.mlp.up_proj", lambda t: t * torch.inf),
        ("safe/weights/model.layers.0.mlp.up_proj", lambda t: t.t().contiguous()),
        ("safe/weights/model.layers.0.mlp.up_proj", lambda t: None),
        ("rows/model.layers.0.mlp.up_proj", lambda t: t + 10_000),
        ("rows/model.layers.0.mlp.up_proj", lambda t: t.flip(0)),
        ("rows/model.layers.0.mlp.up_proj", lambda t: t.int()),
    ],
)
def test_forged_tensors_of_a_detector_are_refused(
    detector, tmp_path: Path, name: str, change: Callable[[torch.Tensor], Any]
) -> None:
    folder, use = detector
    tensors, metadata = load_folder(folder, "detector")
    tensors[name] = change(tensors[name])
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_folder(tmp_path / "forged", "detector", kept, metadata)
    with pytest.raises(StorageError, match="forged"):
        use(tmp_path / "forged")


def test_sizes_are_bounded_before_memory_is_spent(index, tmp_path: Path) -> None:
    folder, use = index
    shutil.copytree(folder, tmp_path / "copy")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["metadata"]["parts"][0]["count"] = 10**9
    manifest["metadata"]["shard_samples"] = 1
    write_manifest(tmp_path / "copy", "trace-index", manifest["metadata"], manifest["files"])
    with pytest.raises(StorageError, match="more than 1000000 shards"):
        use(tmp_path / "copy")


def test_threads_that_save_one_folder_leave_a_whole_one(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def save(number: int) -> None:
        try:
            for _ in range(25):
                save_folder(tmp_path / "x", "kind", {"t": torch.full((9,), number)}, {"n": number})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    tensors, metadata = load_folder(tmp_path / "x", "kind")
    assert tensors["t"].unique().tolist() == [metadata["n"]]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


SAVE_FROM_THREADS = """
import sys, threading, torch
from pathlib import Path
from gradsafe._io.artifacts import save_folder

sys.setswitchinterval(1e-5)
errors = []

def save(number):
    try:
        for _ in range(20):
            save_folder(Path(sys.argv[1]), "kind", {"t": torch.full((9,), number)}, {"n": number})
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=save, args=(number,)) for number in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(str(errors[0]) if errors else 0)
"""


def test_the_first_folder_of_a_process_can_be_saved_by_several_threads(tmp_path: Path) -> None:
    # In a process of its own: a validator that describes its types on first use fails only then.
    for name in "abc":
        done = subprocess.run(
            [sys.executable, "-c", SAVE_FROM_THREADS, str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_can_be_read_while_it_is_replaced(tmp_path: Path) -> None:
    folder, done = tmp_path / "x", threading.Event()

    def save() -> None:
        for number in range(150):
            tensor = torch.full((1000,), number)
            save_folder(folder, "kind", {"t": tensor}, {"n": number})
        done.set()

    save_folder(folder, "kind", {"t": torch.zeros(1000)}, {"n": 0})
    writer = threading.Thread(target=save)
    writer.start()
    seen = set()
    try:
        while not done.is_set():
            tensors, metadata = load_folder(folder, "kind")
            assert tensors["t"].unique().tolist() == [metadata["n"]]
            seen.add(metadata["n"])
    finally:
        writer.join()
    assert len(seen) > 1


def test_a_folder_of_a_stranger_is_not_removed(tmp_path: Path) -> None:
    save_folder(tmp_path / "x", "kind", {}, {})
    (tmp_path / ".x.previous").mkdir()
    (tmp_path / ".x.previous" / "mine").write_text("mine")
    save_folder(tmp_path / "x", "kind", {}, {})
    assert (tmp_path / ".x.previous" / "mine").read_text() == "mine"


def test_tensors_are_read_through_the_manifest_only(detector, tmp_path: Path) -> None:
    folder, use = detector
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "other.safetensors").write_bytes(b"")
    assert use(tmp_path / "copy") == use(folder)
    (tmp_path / "copy" / TENSORS).unlink()
    with pytest.raises(StorageError, match="missing"):
        use(tmp_path / "copy")

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import testbed
from benchmarks.testbed import corpus
from benchmarks.testbed.training import Recipe
from gradsafe._io import cache
from gradsafe._io.artifacts import MANIFEST, PARTIAL, read_manifest, write_manifest


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes ``load`` train a toy; the list grows by one with every training."""
    trainings: list[int] = []
    real = testbed.train

    def toy_recipe() -> Recipe:
        return Recipe(
            vocabulary=320, hidden=16, intermediate=32, layers=1, heads=2, batch=8, threads=1
        )

    def toy_train(rows, recipe, progress=True):  # type: ignore[no-untyped-def]
        trainings.append(1)
        return real(rows[:40], recipe, progress=progress, max_steps=2)

    monkeypatch.setattr(testbed, "Recipe", toy_recipe)
    monkeypatch.setattr(testbed, "train", toy_train)
    return trainings


def _folder(root: Path) -> Path:
    (folder,) = root.glob("testbed-*")
    return folder


def test_trains_once_then_loads(
    small: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = testbed.load(tmp_path, progress=False)
    message = capsys.readouterr().err
    assert "training the testbed once" in message
    assert str(_folder(tmp_path)) in message
    second, tokenizer = testbed.load(tmp_path, progress=False)
    assert capsys.readouterr().err == ""
    assert len(small) == 1
    assert not second.training
    assert tokenizer.chat_template
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_only_data_files(small: list[int], tmp_path: Path) -> None:
    testbed.load(tmp_path, progress=False)
    files = {path.name for path in _folder(tmp_path).iterdir()}
    assert "model.safetensors" in files
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".jinja"}
    folder = _folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f".{folder.name}.lock"}


def test_folder_is_a_model_folder(small: list[int], tmp_path: Path) -> None:
    folder = testbed.folder(tmp_path, progress=False)
    assert folder == _folder(tmp_path)
    model, tokenizer = testbed.load(tmp_path, progress=False)
    again = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert len(small) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
def test_damage_is_found_and_trained_again(
    small: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    testbed.load(tmp_path, progress=False)
    path = _folder(tmp_path) / name
    data = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    testbed.load(tmp_path, progress=False)
    message = capsys.readouterr().err
    assert "damaged" in message
    assert name in message
    assert len(small) == 2
    assert cache.damage(_folder(tmp_path)) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {}}', '{"files": 3}', "\x00\xff"])
def test_a_damaged_manifest(small: list[int], tmp_path: Path, text: str) -> None:
    testbed.load(tmp_path, progress=False)
    (_folder(tmp_path) / MANIFEST).write_text(text, encoding="latin-1")
    testbed.load(tmp_path, progress=False)
    assert len(small) == 2


def test_a_manifest_without_files_is_damaged(tmp_path: Path) -> None:
    write_manifest(tmp_path, cache.KIND, {}, {})
    assert cache.damage(tmp_path) == "the manifest lists no files"


def test_an_empty_folder_is_damaged(small: list[int], tmp_path: Path) -> None:
    testbed.load(tmp_path, progress=False)
    folder = _folder(tmp_path)
    for path in folder.iterdir():
        path.unlink()
    testbed.load(tmp_path, progress=False)
    assert cache.damage(folder) is None


def test_an_interrupted_training_leaves_no_testbed(
    small: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            testbed.load(tmp_path, progress=False)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    testbed.load(tmp_path, progress=False)
    assert len(small) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from gradsafe._io import cache

def fill(scratch):
    (scratch / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

cache.ensure(Path(sys.argv[1]), fill)
"""


def test_a_killed_training_neither_blocks_nor_stays(tmp_path: Path) -> None:
    target = tmp_path / "testbed-x"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    (half,) = tmp_path.glob(f"*{PARTIAL}")
    assert not target.exists()
    cache.ensure(target, _fill)
    assert cache.damage(target) is None
    assert not half.exists()


def _fill(folder: Path) -> dict[str, object]:
    (folder / "model.safetensors").write_bytes(b"weights")
    return {}


@pytest.mark.parametrize("damaged", [False, True])
def test_of_several_at_once_one_trains_and_all_get_the_result(
    tmp_path: Path, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "testbed-x"
    if damaged:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
    barrier, waiting, fills = threading.Barrier(4), threading.Event(), list[Path]()
    monkeypatch.setattr(cache, "announce", lambda text: "waiting" in text and waiting.set())

    def slow_fill(folder: Path) -> dict[str, object]:
        fills.append(folder)
        assert waiting.wait(60)  # until another thread has announced that it waits
        return _fill(folder)

    def run(_: int) -> str | None:
        barrier.wait()
        cache.ensure(target, slow_fill)
        return cache.damage(target)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [None] * 4
    assert len(fills) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".testbed-x.lock", "testbed-x"]


def test_an_unwritable_cache_is_an_error(small: list[int], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        testbed.load(blocked, progress=False)
    assert small == []


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GRADSAFE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_root() == tmp_path / "home" / ".cache" / "gradsafe"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_root() == tmp_path / "home" / ".cache" / "gradsafe"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "gradsafe"
    monkeypatch.setenv("GRADSAFE_CACHE", str(tmp_path / "named"))
    assert cache.cache_root() == tmp_path / "named"
    assert cache.cache_root(tmp_path / "given") == tmp_path / "given"


def test_a_changed_recipe_or_corpus_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {testbed._recipe_hash(recipe) for recipe in (Recipe(), Recipe(seed=1))}
    rows = dict(corpus.build())
    rows["train"] = rows["train"][:-1]
    monkeypatch.setattr(testbed, "build", lambda: rows)
    names.add(testbed._recipe_hash(Recipe()))
    assert len(names) == 3


def test_load_leaves_the_global_random_state(small: list[int], tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    testbed.load(tmp_path, progress=False)
    testbed.load(tmp_path, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_manifest_records_the_recipe(small: list[int], tmp_path: Path) -> None:
    testbed.load(tmp_path, progress=False)
    facts = read_manifest(_folder(tmp_path), cache.KIND)["metadata"]
    assert facts["recipe"]["hidden"] == 16
    assert facts["seconds"] >= 0

import json
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks import testbed
from benchmarks.testbed import cache, corpus
from benchmarks.testbed.training import Recipe


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
    assert [path.name for path in tmp_path.iterdir()] == [_folder(tmp_path).name]


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
    (_folder(tmp_path) / cache.MANIFEST).write_text(text, encoding="latin-1")
    testbed.load(tmp_path, progress=False)
    assert len(small) == 2


def test_an_empty_folder_is_damaged(small: list[int], tmp_path: Path) -> None:
    testbed.load(tmp_path, progress=False)
    folder = _folder(tmp_path)
    for path in folder.iterdir():
        path.unlink()
    testbed.load(tmp_path, progress=False)
    assert cache.damage(folder) is None


def test_a_kill_while_writing_leaves_no_testbed(
    small: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, facts: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(testbed, "seal", killed)
        with pytest.raises(KeyboardInterrupt):
            testbed.load(tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    testbed.load(tmp_path, progress=False)
    assert len(small) == 2


def test_leftover_temporary_folders_go_when_old(small: list[int], tmp_path: Path) -> None:
    testbed.load(tmp_path, progress=False)
    name = _folder(tmp_path).name
    old, young = tmp_path / f".{name}-old.tmp", tmp_path / f".{name}-young.tmp"
    for path in (old, young):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    past = time.time() - 2 * cache.STALE_SECONDS
    os.utime(old, (past, past))
    (_folder(tmp_path) / cache.MANIFEST).unlink()
    testbed.load(tmp_path, progress=False)
    assert not old.exists()
    assert young.exists()  # may belong to a process that is still training


def _race(target: Path) -> list[BaseException]:
    """Four threads that publish the same folder at the same time; returns what they raised."""
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")
        cache.seal(folder, {})
        barrier.wait()  # all have a finished folder before anyone renames

    def run() -> None:
        try:
            cache.publish(target, write)
        except BaseException as error:  # handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("damaged", [False, True])
def test_a_race_ends_well_for_all(
    tmp_path: Path, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, pauses = cache.damage, random.Random(0)

    def slow_to_act(folder: Path) -> str | None:
        found = answer(folder)
        time.sleep(pauses.random() / 1000)  # others change the folder before this is acted upon
        return found

    monkeypatch.setattr(cache, "damage", slow_to_act)
    for attempt in range(40):
        root = tmp_path / str(attempt)
        target = root / "testbed-x"
        root.mkdir()
        if damaged:
            target.mkdir()
            (target / "model.safetensors").write_bytes(b"half")
        assert _race(target) == []
        assert answer(target) is None
        assert list(root.iterdir()) == [target]


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
    manifest = json.loads((_folder(tmp_path) / cache.MANIFEST).read_text())
    assert manifest["recipe"]["hidden"] == 16
    assert manifest["seconds"] >= 0

"""Approximate search: recall on clustered rows, exact scores, and the files of FAISS."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from trace_samples import EXAMPLES, QUERIES, build

import gradsafe
from gradsafe import TraceIndex
from gradsafe.models import Encoded
from gradsafe.tracing import approximate
from gradsafe.tracing.folder import IndexFolder, Shard
from gradsafe.tracing.matching import Metric, best_rows, feature_moments
from gradsafe.tracing.search import Search

SCRIPT = Path(__file__).with_name("search_with_faiss.py")
ROWS, WIDTH = 6000, 64
METRICS = [Metric("none"), Metric("unit", 0.05), Metric("zscore")]


def around(count: int, seed: int) -> torch.Tensor:
    """Rows around 60 centers."""
    centers = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(60, (count,), generator=generator)
    return centers[places] + 0.5 * torch.randn(count, WIDTH, generator=generator)


def add_part(folder: IndexFolder, rows: torch.Tensor) -> None:
    """As `extend` does."""
    folder.metadata["parts"].append({"examples": "", "count": len(rows)})
    for plan in folder.missing:
        start = plan.first - (folder.plan[-1].first + folder.plan[-1].count - len(rows))
        own = rows[start : start + plan.count]
        numbers = torch.arange(plan.first, plan.first + plan.count)
        items = [Encoded([1, 2], 1)] * plan.count
        shard = Shard(own, numbers, numbers.tolist(), items)
        folder.list_shards({plan.name: folder.write_shard(plan, shard)})


@pytest.fixture(scope="module")
def clustered(tmp_path_factory) -> IndexFolder:
    pytest.importorskip("faiss")
    path = tmp_path_factory.mktemp("clustered") / "index"
    folder = IndexFolder.create(path, {"shard_samples": 2500, "parts": []})
    add_part(folder, around(1500, 0))
    add_part(folder, around(1, 1))
    add_part(folder, around(ROWS - 1501, 2))
    return folder


@pytest.fixture
def folder(clustered, tmp_path) -> IndexFolder:
    """A copy that a test may change."""
    shutil.copytree(clustered.path, tmp_path / "index", ignore=shutil.ignore_patterns("faiss*"))
    metadata = {**clustered.metadata, "parts": list(clustered.metadata["parts"])}
    return IndexFolder(tmp_path / "index", metadata, dict(clustered.files))


@pytest.fixture
def added(monkeypatch) -> list[int]:
    """Rows of each shard that an index of FAISS received."""
    faiss = pytest.importorskip("faiss")
    seen: list[int] = []
    add = faiss.IndexIVFScalarQuantizer.add

    def counted(self, rows):
        seen.append(len(rows))
        add(self, rows)

    monkeypatch.setattr(faiss.IndexIVFScalarQuantizer, "add", counted)
    return seen


def check_hits(folder: IndexFolder, search: Search, metric: Metric, least: int = 950) -> None:
    """Scores are exact, and most of the ten best rows are found."""
    queries = around(100, 9)
    found = search.best_rows(queries, 10, metric, approximate=True)
    moments = feature_moments(folder.signatures)
    exact = best_rows(queries, folder.signatures(), ROWS // 8, metric, moments)
    recall = 0
    for query in range(len(queries)):
        places = {row: place for place, row in enumerate(exact.indices[query].tolist())}
        own = [places[row] for row in found.indices[query].tolist()]
        assert own == sorted(own)  # best first, none twice
        assert len({*own}) == 10
        assert torch.equal(found.scores[query], exact.scores[query, own])
        recall += len({*own} & {*range(10)})
    print(f"recall at 10, {metric}: {recall / 1000:.3f}")
    assert recall >= least


@pytest.mark.parametrize("metric", METRICS)
def test_most_of_the_best_are_found_and_scores_are_exact(folder, metric, monkeypatch):
    search = Search(folder)
    check_hits(folder, search, metric)
    read: list[int] = []
    rows_of = IndexFolder.signature_rows

    def counted(self, plan, rows=slice(None)):
        found = rows_of(self, plan, rows)
        read.append(len(found))
        return found

    monkeypatch.setattr(IndexFolder, "signature_rows", counted)
    search.best_rows(around(1, 3), 10, metric, approximate=True)
    assert sum(read) == 100  # nothing but the candidates
    read.clear()
    Search(folder).best_rows(around(1, 3), 10, metric, approximate=True)
    assert sum(read) == 100  # in the next process, too: the moments are saved


@pytest.mark.parametrize("metric", METRICS)
def test_the_second_process_builds_nothing(folder, metric, added):
    first = Search(folder)
    check_hits(folder, first, metric)
    assert added == [1500, 1, 2500, 1999]
    added.clear()
    second = Search(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_hits(folder, second, metric)
    assert not added
    queries = around(20, 4)
    for k in (1, 30):
        a, b = (s.best_rows(queries, k, metric, approximate=True) for s in (first, second))
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.scores, b.scores)


@pytest.mark.parametrize("metric", METRICS)
def test_only_new_rows_are_added_until_there_are_twice_as_many(folder, metric, added):
    check_hits(folder, Search(folder), metric)
    added.clear()
    add_part(folder, 1.2 * around(3000, 11) + 0.3)  # other moments than those of the training
    check_hits(folder, Search(folder), metric)
    assert added == [2500, 500]
    added.clear()
    check_hits(folder, Search(folder), metric)
    assert not added
    add_part(folder, around(3001, 12))
    check_hits(folder, Search(folder), metric)
    assert sum(added) == ROWS + 3000 + 3001


def test_an_open_index_stays_as_it_is_while_another_process_adds_rows(folder, added):
    metric = Metric("zscore")
    parts = list(folder.metadata["parts"])
    before = IndexFolder(folder.path, {**folder.metadata, "parts": parts}, dict(folder.files))
    old = Search(before)
    add_part(folder, around(3000, 11))
    check_hits(folder, Search(folder), metric)
    added.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_hits(before, old, metric)  # it reads the newer file and none of the newer rows
        check_hits(folder, Search(folder), metric)
    assert not added


@pytest.mark.parametrize("damage", ["flip", "cut", "record", "moments", "removed", "other shards"])
def test_a_file_that_cannot_be_used_is_announced_and_built_again(folder, damage, added):
    metric = Metric("zscore")
    check_hits(folder, Search(folder), metric)
    index, record = (folder.path / name for name in folder.faiss())
    assert (index.suffix, record.suffix) == (".index", ".safetensors")
    data = bytearray((record if damage in ("record", "moments") else index).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        index.write_bytes(data)
    elif damage == "cut":
        index.write_bytes(data[:-5])
    elif damage == "record":
        record.write_bytes(data[:50])
    elif damage == "moments":
        data[-3] ^= 1
        record.write_bytes(data)
    elif damage == "removed":
        index.unlink()
    else:
        folder.files[folder.present[1].name]["sha256"] = "0" * 64
    added.clear()
    with pytest.warns(UserWarning, match=r"cannot use .*faiss-zscore\.index .*it is built again"):
        check_hits(folder, Search(folder), metric)
    assert sum(added) == ROWS
    added.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_hits(folder, Search(folder), metric)
    assert not added


def start(folder: IndexFolder, *step: str) -> subprocess.Popen[str]:
    """Another process that searches."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder.path), *step],
        env={**os.environ, "PYTHONPATH": str(Path(gradsafe.__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("step", ["file", "record", "rename of the record"])
def test_death_while_the_files_are_written_is_survived(folder, step):
    killed = start(folder, step)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert list(folder.path.glob(".faiss*")) or folder.faiss()
    folder.sweep()
    assert not list(folder.path.glob(".faiss*"))
    check_hits(folder, Search(folder), Metric("unit"))


def test_processes_that_search_at_once_do_not_disturb_each_other(folder, added):
    searches = [start(folder) for _ in range(3)]
    said = {search.communicate()[0] for search in searches}
    assert [search.returncode for search in searches] == [0, 0, 0]
    assert len(said) == 1
    check_hits(folder, Search(folder), Metric("unit"))
    assert not added


@pytest.mark.parametrize("error", [PermissionError("read-only"), OSError(28, "No space left")])
def test_a_folder_that_cannot_be_written_is_searched_in_memory(folder, error, monkeypatch, added):
    metric = Metric("unit")

    def refused(path):
        raise error

    monkeypatch.setattr(approximate, "atomic_path", refused)
    search = Search(folder)
    with pytest.warns(UserWarning, match="cannot save .*keeps the FAISS index in memory"):
        check_hits(folder, search, metric)
    assert sum(added) == ROWS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_hits(folder, search, metric)
    assert sum(added) == ROWS
    assert not folder.faiss()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_searched_in_memory(folder):
    folder.path.chmod(0o500)
    with pytest.warns(UserWarning, match="cannot save"):
        check_hits(folder, Search(folder), Metric("unit"))


def test_an_extension_adds_to_saved_files_and_others_know_them(
    model, tokenizer, tmp_path, added, monkeypatch
):
    index = build(model, tokenizer, tmp_path / "a", EXAMPLES[:20])
    options = ({}, {"part_norm": "unit", "gradient_weight": 0.1})
    for option in options:
        index.query(QUERIES, 5, approximate=True, **option)
    assert sum(added) == 2 * 20
    added.clear()
    index.extend(EXAMPLES[20:], progress=False)
    assert added == [3, 3]
    index.save(tmp_path / "copy")
    copy = TraceIndex.load(tmp_path / "copy", model, tokenizer)
    for option in options:
        for searched in (index, copy):
            found = searched.query(QUERIES, 12, approximate=True, **option)
            exact = index.query(QUERIES, 12, **option)
            assert found.ids == exact.ids
            assert torch.equal(found.scores, exact.scores)
    assert found.text(0, 11) == exact.text(0, 11)
    assert added == [3, 3]
    copy.save(tmp_path / "copy2")
    index.save(tmp_path / "copy2")  # an index with files of FAISS may be replaced
    (copy.path / "shard-000001.safetensors").unlink()
    assert len(copy._folder.faiss()) == 4
    TraceIndex.repair(copy.path)
    assert not copy._folder.faiss()
    monkeypatch.setitem(sys.modules, "faiss", None)
    index.extend([{"prompt": "and", "response": "more"}], progress=False)  # does without


def test_windows_of_one_sample_count_once(model, tokenizer, tmp_path):
    pytest.importorskip("faiss")
    long = {"id": "long", "prompt": "x" * 100 + "why 7", "response": "so 49"}
    rows = [*EXAMPLES[:9], long, *EXAMPLES[9:]]
    index = build(model, tokenizer, tmp_path / "w", rows, overflow="window", max_length=60)
    assert index.query([long], 24, approximate=True).ids == index.query([long], 24).ids


def test_without_faiss_the_extra_is_named(model, tokenizer, tmp_path, monkeypatch):
    index = build(model, tokenizer, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("gradsafe.tracing.index.signatures", lambda *_: pytest.fail("too late"))
    with pytest.raises(ImportError, match=r"approximate=True needs FAISS: pip install 'gradsafe\["):
        index.query(QUERIES, 2, approximate=True)

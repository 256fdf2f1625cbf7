"""Parts of one output: any process writes any records, and the whole is in input order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gradsafe._io.parts import PartWriter, check_parts, merge, part_paths, read_found
from gradsafe._io.records import JsonlWriter, record_key

KEYS = [record_key(i, prompt, run="r1") for i, prompt in enumerate("abcde")]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return tmp_path / "out[1].jsonl"  # no pattern of names


def write(whole: Path, rank: int, count: int, *indices: int) -> Path:
    writer = PartWriter(whole, KEYS, rank, count)
    for index in indices:
        writer.write(index, {"score": index / 8})
    writer.close()
    writer.close()
    return writer.path


def in_one_go(whole: Path) -> bytes:
    path = whole.with_name("expected.jsonl")
    with JsonlWriter(path, KEYS, overwrite=True) as writer:
        for index in range(len(KEYS)):
            writer.write({"score": index / 8})
    return path.read_bytes()


def test_the_whole_is_that_of_one_writer(whole: Path) -> None:
    write(whole, 0, 2, 4, 1)
    write(whole, 1, 2, 0, 3, 2)
    records = merge(whole, KEYS)
    assert whole.read_bytes() == in_one_go(whole)
    assert [record["index"] for record in records] == list(range(5))
    assert not part_paths(whole)
    assert {entry.name for entry in whole.parent.iterdir()} == {whole.name, "expected.jsonl"}


def test_parts_of_other_numbers_of_processes_and_a_beginning_count(whole: Path) -> None:
    whole.write_bytes(in_one_go(whole)[:-200])
    write(whole, 0, 2, 3)
    write(whole, 3, 4, 4)
    write(whole, 10, 11, 2, 4)  # twice the same record is no harm
    assert set(read_found(whole, KEYS)) == set(range(5))
    merge(whole, KEYS)
    assert whole.read_bytes() == in_one_go(whole)
    assert not part_paths(whole)


def test_a_crash_between_merging_and_removing_is_repaired(whole: Path) -> None:
    kept = write(whole, 0, 1, *range(5)).read_bytes()
    merge(whole, KEYS)
    whole.with_name(f"{whole.name}.part-0-of-1").write_bytes(kept)
    merge(whole, KEYS)
    assert whole.read_bytes() == in_one_go(whole)
    assert not part_paths(whole)


def test_every_cut_of_the_last_line_is_repaired(whole: Path) -> None:
    part = write(whole, 0, 2, 3, 1)
    first = part.read_bytes().splitlines(keepends=True)[0]
    line = part.read_bytes()[len(first) :]
    for cut in range(len(line)):
        part.write_bytes(first + line[:cut])
        assert set(read_found(whole, KEYS)) == {3}
        assert write(whole, 0, 2, 1).read_bytes() == first + line


def test_nothing_is_lost_while_a_record_is_missing(whole: Path) -> None:
    part = write(whole, 0, 2, 0, 1, 2, 4)
    before = part.read_bytes()
    with pytest.raises(ValueError, match=r"1 of 5 records are in no part: .* shared folder"):
        merge(whole, KEYS)
    assert part.read_bytes() == before
    assert not whole.exists()


def test_a_failing_merge_leaves_everything(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = write(whole, 0, 1, *range(5))
    names = {entry.name for entry in whole.parent.iterdir()}

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        merge(whole, KEYS)
    assert {entry.name for entry in whole.parent.iterdir()} == names
    assert set(read_found(whole, KEYS)) == set(range(5))
    assert part.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"index": 9}\n', ":2: more records than the 5 expected"),
        (b'{"index": -1}\n', ":2: not a record"),
        (b'{"index": true}\n', ":2: not a record"),
        (b'{"score": 1}\n', ":2: not a record"),
        (b"\xff\n", ":2: not a record"),
        (b'{"index": 1}\n', ':2: prompt_sha256 is null, expected "'),
    ],
)
def test_refuses_what_another_run_wrote(whole: Path, line: bytes, message: str) -> None:
    part = write(whole, 0, 2, 3)
    part.write_bytes(part.read_bytes() + line)
    with pytest.raises(ValueError, match=message):
        read_found(whole, KEYS)


def test_leftovers_need_a_decision(whole: Path) -> None:
    check_parts(whole, resume=False, overwrite=False)
    write(whole, 0, 2, 3)
    check_parts(whole, resume=True, overwrite=False)
    check_parts(whole, resume=False, overwrite=True)
    with pytest.raises(FileExistsError, match=r"part-0-of-2 was left by an interrupted run"):
        check_parts(whole, resume=False, overwrite=False)
    check_parts(whole.with_name("out1.jsonl"), resume=False, overwrite=False)

"""Rows are read with errors that name the line; the records of an interrupted run are continued."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gradsafe._io.processes import Processes
from gradsafe._io.records import (
    Records,
    check_output,
    labels_of,
    part_paths,
    read_jsonl,
    read_rows,
    record_key,
    to_line,
)
from gradsafe._io.slices import Slices
from gradsafe.models.rows import pair, prompt_of


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


class TestReading:
    def test_skips_blank_lines_and_tolerates_bom_and_windows_line_ends(self, file: Path) -> None:
        written(file, b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "\xc3\xa9", "x": 1}')
        rows = read_jsonl(file)
        assert rows == [{"prompt": "a"}, {"prompt": "é", "x": 1}]
        assert [row.where for row in rows] == [f"{file}:1", f"{file}:4"]

    def test_only_line_feeds_end_a_line(self, file: Path) -> None:
        written(file, '{"prompt": "a\u2028b\x85c"}\n')
        assert read_jsonl(file) == [{"prompt": "a\u2028b\x85c"}]

    def test_empty_file_has_no_rows(self, file: Path) -> None:
        assert read_jsonl(written(file, "")) == []

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b'{"prompt": ', "not valid JSON: Expecting value at column"),
            (b"[1]", "expected a JSON object, got list"),
            (b'"text"', "expected a JSON object, got str"),
            (b"\xff\xfe", "not UTF-8"),
            (b"[" * 100_000, "not readable JSON"),
            (b'{"n": ' + b"1" * 5000 + b"}", "not readable JSON"),
            (b'{"source_id": NaN}', "not readable JSON: NaN is not a finite number"),
            (b'{"source_id": 1e999}', "not readable JSON: 1e999 is not a finite number"),
            (b'{"a": 1, "b": {"c": 1, "c": 2}}', "not readable JSON: the field 'c' is given twice"),
        ],
    )
    def test_names_file_and_line_of_a_malformed_record(
        self, file: Path, line: bytes, reason: str
    ) -> None:
        written(file, b'{"prompt": "fine"}\n\n' + line + b"\n")
        with pytest.raises(ValueError, match=rf"prompts\.jsonl:3: {reason}"):
            read_jsonl(file)

    def test_messages_never_quote_the_prompt(self, file: Path) -> None:
        written(file, '{"prompt": "SECRET" "x"}')
        with pytest.raises(ValueError, match="not valid JSON") as caught:
            read_jsonl(file)
        assert "SECRET" not in str(caught.value)

    def test_limit_stops_before_later_lines(self, file: Path) -> None:
        written(file, '{"prompt": "a"}\n{"prompt": "b"}\nbroken')
        assert len(read_jsonl(file, limit=2)) == 2
        with pytest.raises(ValueError, match="limit must be at least 1"):
            read_jsonl(file, limit=0)

    def test_missing_file_is_named(self, file: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no such file: .*prompts\.jsonl"):
            read_jsonl(file)

    def test_text_files_hold_one_prompt_per_line(self, tmp_path: Path) -> None:
        path = written(tmp_path / "prompts.txt", ' one \n\n{"prompt": 2}\nthree')
        rows = read_rows(path)
        assert [row["prompt"] for row in rows] == ["one", '{"prompt": 2}', "three"]
        assert [row["prompt"] for row in read_rows(path, limit=1)] == ["one"]


class TestLabels:
    def read(self, file: Path, *labels: str) -> list[int] | None:
        written(file, "\n".join(f'{{"prompt": "p", "label": {label}}}' for label in labels))
        return labels_of(read_jsonl(file))

    def test_accepts_names_numbers_and_booleans(self, file: Path) -> None:
        assert self.read(file, '"safe"', '"unsafe"', "0", "1", "false", "true") == [
            0,
            1,
            0,
            1,
            0,
            1,
        ]

    def test_no_labels_at_all(self, file: Path) -> None:
        assert self.read(file, "null", "null") is None

    @pytest.mark.parametrize("label", ['"bad"', '"Safe"', '"1"', "2", "1.0", "[]", "-1"])
    def test_other_values_name_the_line_and_what_is_allowed(self, file: Path, label: str) -> None:
        with pytest.raises(ValueError, match=r'jsonl:2: label .* is not one of "safe", "unsafe"'):
            self.read(file, "0", label)

    def test_some_but_not_all(self, file: Path) -> None:
        with pytest.raises(ValueError, match=r"jsonl:2: no label, but other"):
            self.read(file, "0", "null")


USER, REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


class TestFormats:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"prompt": "p", "response": "r"}, ("p", "r")),
            ({"prompt": "p", "completion": "c"}, ("p", "c")),
            ({"prompt": [USER], "completion": [REPLY]}, ([USER], "a")),
            ({"prompt": [USER], "response": "r", "messages": None}, ([USER], "r")),
            ({"messages": [USER, REPLY, USER, REPLY]}, ([USER, REPLY, USER], "a")),
        ],
    )
    def test_pairs(self, row: dict[str, Any], expected: tuple[Any, str]) -> None:
        assert pair(row, "here") == expected

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"text": "x"}, "the field 'prompt' is missing"),
            ({"prompt": None, "response": "r"}, "the field 'prompt' is missing"),
            ({"prompt": 3, "response": "r"}, "the field 'prompt' must be text or a list of mess"),
            ({"prompt": ["x"], "response": "r"}, "the field 'prompt' must be text or a list"),
            ({"prompt": "", "response": "r"}, "the field 'prompt' is empty"),
            ({"prompt": [], "response": "r"}, "the field 'prompt' is empty"),
            ({"prompt": "\ud800", "response": "r"}, "the field 'prompt' holds half a surrogate"),
            ({"prompt": "p"}, "the field 'response' is missing"),
            ({"prompt": "p", "completion": 3}, "the field 'completion' must be text or a list"),
            ({"prompt": "p", "completion": [USER]}, "expected 'completion' to be text or one mess"),
            ({"prompt": "p", "response": [REPLY, REPLY]}, "text or one message of the assistant"),
            ({"messages": [USER]}, "expected 'messages' to end with a message of the assistant"),
            ({"messages": [REPLY]}, "after at least one other"),
            ({"messages": "text"}, "the field 'messages' must be a list of messages, got text"),
            ({"messages": [USER, {**REPLY, "content": None}]}, "the last message must be text"),
        ],
    )
    def test_what_is_wrong_is_named(self, row: dict[str, Any], reason: str) -> None:
        with pytest.raises((TypeError, ValueError), match=f"^here: .*{reason}"):
            pair(row, "here")

    def test_a_prompt_alone(self) -> None:
        assert prompt_of({"prompt": "p"}, "here") == "p"
        assert prompt_of({"messages": [USER]}, "here") == [USER]


KEYS = [record_key(i, prompt, run="r1") for i, prompt in enumerate("abcde")]
OTHER = [record_key(i, prompt, run="r2") for i, prompt in enumerate("abcde")]


def records(path: Path | None, rank: int = 0, count: int = 1, **options: Any) -> Records:
    return Records(path, options.pop("keys", KEYS), Processes(rank, count, rank), **options)


def write(path: Path, rank: int, count: int, *indices: int) -> Path:
    """Writes the records of one process; returns its part."""
    writer = records(path, rank, count)
    for index in indices:
        writer.write(index, {"score": index / 8})
    writer.close()
    writer.close()
    return path.with_name(f"{path.name}.part-{rank}-of-{count}")


def fail(path: Path | None, error: BaseException, **options: Any) -> None:
    with records(path, **options) as writer:
        writer.write(2, {"score": 0.25})
        raise error


def complete() -> bytes:
    return "".join(to_line({**key, "score": i / 8}) for i, key in enumerate(KEYS)).encode()


class TestRecords:
    def test_a_record_is_on_disk_when_it_is_written(self, file: Path) -> None:
        writer = records(file)
        writer.write(2, {"score": 0.25})
        (part,) = part_paths(file)
        assert json.loads(part.read_text()) == {**KEYS[2], "score": 0.25}
        assert KEYS[0]["prompt_sha256"].startswith("ca978112ca1bbdca")

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_interruption_says_what_is_saved(self, file: Path, overwrite: bool) -> None:
        how = "--resume" + " in place of --overwrite" * overwrite
        with pytest.raises(KeyboardInterrupt) as caught:
            fail(file, KeyboardInterrupt(), unit="slices", overwrite=overwrite)
        saved = f"1 of 5 slices are in {file}.part-*"
        assert str(caught.value) == f"{saved}; run the same command with {how} to continue"

    def test_an_error_stays_the_same_and_says_it_as_well(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for path in (file, None):
            with pytest.raises(OSError, match="disk") as caught:
                fail(path, OSError("disk"))
            assert str(caught.value) == "disk"
            said = "gradsafe: 1 of 5 records are in" in capsys.readouterr().err
            assert said == (path is not None)

    def test_lines_are_strict_json_in_ascii(self) -> None:
        assert to_line({"x": "\u2028é\x1b\ud800"}).isascii()
        with pytest.raises(ValueError, match="Out of range float"):
            to_line({"score": float("nan")})

    def test_standard_output(self, capsys: pytest.CaptureFixture[str]) -> None:
        writer = records(None)
        writer.begin()
        writer.write(0, {"score": 1})
        assert json.loads(capsys.readouterr().out) == {**KEYS[0], "score": 1}
        assert [record["score"] for record in writer.finish()] == [1]

    def test_the_result_does_not_depend_on_the_processes(self, file: Path) -> None:
        write(file, 0, 2, 4, 1)
        write(file, 1, 2, 0, 3, 2)
        found = records(file).finish()
        assert file.read_bytes() == complete()
        assert [record["index"] for record in found] == list(range(5))
        assert list(file.parent.iterdir()) == [file]

    def test_parts_of_other_numbers_of_processes_are_used(self, file: Path) -> None:
        file.write_bytes(complete()[:-200])
        write(file, 0, 2, 3)
        write(file, 3, 4, 4)
        write(file, 10, 11, 2, 4)  # a record may occur twice
        writer = records(file, resume=True)
        assert set(writer.found) == set(range(5))
        writer.finish()
        assert file.read_bytes() == complete()
        assert not part_paths(file)

    def test_a_crash_between_merging_and_removing_is_repaired(self, file: Path) -> None:
        kept = write(file, 0, 1, *range(5)).read_bytes()
        records(file).finish()
        file.with_name(f"{file.name}.part-0-of-1").write_bytes(kept)
        records(file).finish()
        assert file.read_bytes() == complete()
        assert not part_paths(file)

    def test_every_cut_of_the_last_line_is_repaired(self, file: Path) -> None:
        part = write(file, 0, 2, 3, 1)
        first = part.read_bytes().splitlines(keepends=True)[0]
        line = part.read_bytes()[len(first) :]
        for cut in range(len(line)):
            part.write_bytes(first + line[:cut])
            assert set(records(file, resume=True).found) == {3}
            assert write(file, 0, 2, 1).read_bytes() == first + line

    def test_nothing_is_lost_while_a_record_is_missing(self, file: Path) -> None:
        part = write(file, 0, 2, 0, 1, 2, 4)
        before = part.read_bytes()
        with pytest.raises(ValueError, match=r"1 of 5 records are in no part: .* shared folder"):
            records(file).finish()
        assert part.read_bytes() == before
        assert not file.exists()

    def test_a_failing_merge_leaves_everything(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(file, 0, 1, *range(5))
        names = {entry.name for entry in file.parent.iterdir()}

        def full(_: int) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            records(file).finish()
        assert {entry.name for entry in file.parent.iterdir()} == names
        assert set(records(file, resume=True).found) == set(range(5))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"index": 9}\n', ":2: more records than the 5 expected"),
            (b'{"index": -1}\n', ":2: not a record"),
            (b'{"index": true}\n', ":2: not a record"),
            (b'{"score": 1}\n', ":2: not a record"),
            (b"not json\n", ":2: not a record"),
            (b"\xff\n", ":2: not a record"),
            (b"\n", ":2: not a record"),
            (b'{"index": 1}\n', ':2: prompt_sha256 is null, expected "'),
            (to_line(OTHER[1]).encode(), r':2: run is "r2", expected "r1"'),
        ],
    )
    @pytest.mark.parametrize("in_part", [True, False])
    def test_records_of_another_run_are_refused(
        self, file: Path, line: bytes, message: str, in_part: bool
    ) -> None:
        part = write(file, 0, 2, 3)
        place = part if in_part else part.rename(file)
        before = place.read_bytes() + line
        place.write_bytes(before)
        with pytest.raises(ValueError, match=message):
            records(file, resume=True)
        assert place.read_bytes() == before

    def test_overwriting_keeps_the_old_file_until_the_new_one_is_complete(self, file: Path) -> None:
        file.write_text("old")
        write(file, 3, 7, 2)  # of an earlier run
        writer = records(file, overwrite=True)
        writer.begin()
        assert not part_paths(file)
        writer.write(0, {"score": 0.0})
        writer.close()
        assert file.read_text() == "old"
        again = records(file, resume=True)  # after an interruption
        assert set(again.found) == {0}
        for index in range(1, 5):
            again.write(index, {"score": index / 8})
        again.finish()
        assert file.read_bytes() == complete()

    def test_a_run_that_fails_before_its_first_record_leaves_nothing(self, file: Path) -> None:
        writer = records(file)
        writer.begin()
        writer.close()
        assert not list(file.parent.iterdir())


class TestDestinations:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no such folder .*nowhere, create it"):
            check_output(tmp_path / "nowhere" / "out.jsonl")

    def test_a_folder_is_not_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileExistsError, match="not a regular file"):
            check_output(tmp_path, overwrite=True)

    def test_an_existing_file_or_part_needs_a_decision(self, file: Path) -> None:
        check_output(file)
        part = write(file, 0, 2, 3)
        with pytest.raises(FileExistsError, match=r"part-0-of-2 was left by an interrupted run"):
            check_output(file)
        check_output(file.with_name("prompts.json"))
        part.rename(file)
        with pytest.raises(FileExistsError, match="exists: choose resume, overwrite"):
            check_output(file)
        check_output(file, resume=True)
        check_output(file, overwrite=True)
        with pytest.raises(ValueError, match="exclude each other"):
            check_output(file, resume=True, overwrite=True)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_read_only_folder(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError, match="cannot write"):
            check_output(tmp_path / "out.jsonl")


def test_two_runs_at_once_overwrite_nothing_of_each_other(file: Path) -> None:
    keys = [{"index": i} for i in range(6)]
    with Records(file, keys, Processes()) as first:
        first.begin()
        first.write(0, {"score": 0.5})
        with Records(file, keys, Processes(), resume=True) as second:
            for index in (1, 2, 3):
                first.write(index, {"score": index / 7})
                second.write(index + 2, {"score": index / 3})
    found = Records(file, keys, Processes(), resume=True).found
    assert sorted(found) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", ["replaced", "longer", "shorter"])
def test_lines_of_a_file_that_changed_are_refused(file: Path, change: str) -> None:
    lines = [f'{{"a": {i}}}\n' for i in range(7)]
    file.write_text("".join(lines))
    slices = Slices(file, 3, lambda row: None)
    assert [raw.decode() for _, raw in slices.lines()] == lines
    new = {
        "replaced": ['{"b": 0}\n', *lines[1:]],
        "longer": [*lines, lines[0]],
        "shorter": lines[:6],
    }
    file.write_text("".join(new[change]))
    with pytest.raises(ValueError, match="the file changed while it was read"):
        list(slices.lines())

"""Reading names the line of every mistake; a killed writer continues where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gradsafe._io.records import (
    JsonlWriter,
    check_output,
    labels_of,
    read_jsonl,
    read_prompts,
    read_rows,
    record_key,
    to_line,
)


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
        assert [row.line for row in rows] == [1, 4]  # type: ignore[attr-defined]

    def test_only_line_feeds_end_a_line(self, file: Path) -> None:
        written(file, '{"prompt": "a\u2028b\x85c"}\n')
        assert read_prompts(file) == ["a\u2028b\x85c"]

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
            (b'{"text": "x"}', "the field 'prompt' is missing"),
            (b'{"prompt": null}', "the field 'prompt' must be text, got NoneType"),
            (b'{"prompt": ["x"]}', "the field 'prompt' must be text, got list"),
            (b'{"prompt": ""}', "the field 'prompt' is empty"),
            (b'{"prompt": "\\ud800"}', "the field 'prompt' holds half a surrogate pair"),
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

    def test_checks_every_required_field(self, file: Path) -> None:
        written(file, '{"prompt": "a"}')
        with pytest.raises(ValueError, match="'response' is missing"):
            read_jsonl(file, required=("prompt", "response"))

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
        assert read_prompts(path) == ["one", '{"prompt": 2}', "three"]
        assert [row["prompt"] for row in read_rows(path, limit=1)] == ["one"]


class TestLabels:
    def read(self, file: Path, *labels: str) -> list[int] | None:
        written(file, "\n".join(f'{{"prompt": "p", "label": {label}}}' for label in labels))
        return labels_of(read_jsonl(file), file)

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
        assert labels_of([{"prompt": "a"}, {"prompt": "b"}], file) is None
        assert self.read(file, "null", "null") is None

    @pytest.mark.parametrize("label", ['"bad"', '"Safe"', '"1"', "2", "1.0", "[]", "-1"])
    def test_other_values_name_the_line_and_what_is_allowed(self, file: Path, label: str) -> None:
        with pytest.raises(ValueError, match=r'jsonl:2: label .* is not one of "safe", "unsafe"'):
            self.read(file, "0", label)

    def test_some_but_not_all(self, file: Path) -> None:
        with pytest.raises(ValueError, match=r"jsonl:2: no label, though other"):
            self.read(file, "0", "null")


KEYS = [record_key(i, prompt, run="r1") for i, prompt in enumerate(["a", "b", "c"])]


def write_two(path: Path) -> bytes:
    with JsonlWriter(path, KEYS) as writer:
        writer.write({"score": 0.5})
        writer.write({"score": 0.25})
    return path.read_bytes()


class TestWriter:
    def test_writes_key_and_fields_line_by_line(self, file: Path) -> None:
        with JsonlWriter(file, KEYS) as writer:
            writer.write({"score": 0.5})
            on_disk = json.loads(file.read_text())
            assert len(writer) == 1
        assert on_disk == {**KEYS[0], "score": 0.5}
        assert KEYS[0]["prompt_sha256"].startswith("ca978112ca1bbdca")

    def test_lines_are_strict_json_in_ascii(self) -> None:
        assert to_line({"x": "\u2028é\x1b\ud800"}).isascii()
        with pytest.raises(ValueError, match="Out of range float"):
            to_line({"score": float("nan")})

    def test_missing_folder_is_named_at_once(self, tmp_path: Path) -> None:
        for start in (check_output, lambda path: JsonlWriter(path, KEYS)):
            with pytest.raises(FileNotFoundError, match=r"no such folder .*nowhere, create it"):
                start(tmp_path / "nowhere" / "out.jsonl")

    def test_a_folder_is_not_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileExistsError, match="not a regular file"):
            JsonlWriter(tmp_path, KEYS, overwrite=True)

    def test_existing_file_needs_a_decision(self, file: Path) -> None:
        before = write_two(file)
        with pytest.raises(FileExistsError, match="exists: choose resume, overwrite"):
            JsonlWriter(file, KEYS)
        with pytest.raises(ValueError, match="exclude each other"):
            JsonlWriter(file, KEYS, resume=True, overwrite=True)
        assert file.read_bytes() == before

    def test_overwrite_starts_anew_with_the_first_record(self, file: Path) -> None:
        before = write_two(file)
        with JsonlWriter(file, KEYS, overwrite=True) as writer:
            assert len(writer) == 0
            assert file.read_bytes() == before
            writer.write({})
        assert len(read_jsonl(file, required=())) == 1

    def test_a_run_that_fails_before_its_first_record_leaves_nothing(self, file: Path) -> None:
        with JsonlWriter(file, KEYS):
            pass
        assert not file.exists()

    def test_two_runs_cannot_start_the_same_file(self, file: Path) -> None:
        with JsonlWriter(file, KEYS) as first, JsonlWriter(file, KEYS) as second:
            first.write({})
            with pytest.raises(FileExistsError):
                second.write({})

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_read_only_folder_is_named_at_once(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError, match="cannot write"):
            JsonlWriter(tmp_path / "out.jsonl", KEYS)

    def test_closing_twice_is_harmless(self, file: Path) -> None:
        writer = JsonlWriter(file, KEYS)
        writer.write({})
        writer.close()
        writer.close()

    def test_stays_valid_when_the_run_dies(self, file: Path) -> None:
        def interrupted_run() -> None:
            with JsonlWriter(file, KEYS) as writer:
                writer.write({"score": 0.5})
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted_run()
        assert len(read_jsonl(file, required=())) == 1


class TestResume:
    def test_continues_and_keeps_what_was_there(self, file: Path) -> None:
        before = write_two(file)
        with JsonlWriter(file, KEYS, resume=True) as writer:
            assert [record["score"] for record in writer.existing] == [0.5, 0.25]
            assert len(writer) == 2
            writer.write({"score": 1.0})
        assert file.read_bytes().startswith(before)
        assert json.loads(file.read_text().splitlines()[2]) == {**KEYS[2], "score": 1.0}

    def test_a_missing_file_is_started(self, file: Path) -> None:
        with JsonlWriter(file, KEYS, resume=True) as writer:
            writer.write({})
        assert len(read_jsonl(file, required=())) == 1

    @pytest.mark.parametrize("kept", [0, 1, 2])
    def test_every_cut_of_the_last_line_is_repaired(self, file: Path, kept: int) -> None:
        lines = [*write_two(file).splitlines(keepends=True), b'{"index": 2}\n']
        whole = b"".join(lines[:kept])
        for cut in range(len(lines[kept])):
            written(file, whole + lines[kept][:cut])
            with JsonlWriter(file, KEYS, resume=True) as writer:
                assert len(writer) == kept
            assert file.read_bytes() == whole

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ([KEYS[0], record_key(1, "other", run="r1")], r":2: prompt_sha256 is .* expected"),
            ([KEYS[1], KEYS[0]], r":1: index is 0, expected 1"),
            ([record_key(i, p, run="r2") for i, p in enumerate("ab")], r':1: run is "r1", expect'),
            ([KEYS[0]], r":2: more records than the 1 expected"),
        ],
    )
    def test_refuses_records_of_another_run(
        self, file: Path, keys: list[dict[str, object]], message: str
    ) -> None:
        before = write_two(file)
        with pytest.raises(ValueError, match=message):
            JsonlWriter(file, keys, resume=True)
        assert file.read_bytes() == before

    @pytest.mark.parametrize("line", [b"not json\n", b"[]\n", b"\xff\n", b"\n"])
    def test_refuses_foreign_lines(self, file: Path, line: bytes) -> None:
        before = written(file, line).read_bytes()
        with pytest.raises(ValueError, match=":1: not a record of an earlier run"):
            JsonlWriter(file, KEYS, resume=True)
        assert file.read_bytes() == before

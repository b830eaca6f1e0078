"""Small files: whole or not at all, and one line where they cannot be."""

import json
import os

import pytest

from megatron_most import files
from megatron_most.errors import CheckpointError, ConfigError, DataError


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "a.json"
    for value in ({"word": "Käse"}, {"word": "fox"}):
        files.write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == files.read_json(path) == value
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_what_cannot_be_written_is_one_line_and_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.txt", tmp_path / "folder"):
        for refuse in (files.require_writable, lambda path: files.write_text(path, "x")):
            with pytest.raises(ConfigError, match=f"^{path}: "):
                refuse(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]
    files.require_writable(tmp_path / "new" / "a.txt")
    assert (tmp_path / "new").is_dir() and not (tmp_path / "new" / "a.txt").exists()


def test_a_text_is_on_disk_before_it_gets_its_name_and_the_name_before_we_return(tmp_path, monkeypatch):
    path, events = tmp_path / "a.json", []
    monkeypatch.setattr(files, "_sync", lambda synced: events.append((synced == tmp_path, path.exists())))
    files.write_json(path, {})
    assert events == [(False, False), (True, True)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1,\n}', "not readable as JSON: .*: line 2 column 1"),
        (b"\xff", "not readable as JSON: 'utf-8' codec can't decode byte 0xff in position 0"),
        (b"[" * 100_000, "not readable as JSON: "),
        (b"[1]", "must hold a JSON object$"),
        (None, "no such file$"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_caller_s_kind(tmp_path, content, problem):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    for raises in (CheckpointError, ConfigError, DataError):
        with pytest.raises(raises, match=f"^{path}: {problem}") as caught:
            files.read_json(path, raises)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_written_is_an_error_of_the_caller_s_kind(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/file/a.json: cannot be written: "):
        files.write_json(tmp_path / "file" / "a.json", {}, CheckpointError)


def test_only_regular_files_within_the_limit_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(CheckpointError, match="not a regular file$"):
            files.read_json(path, CheckpointError)
    with pytest.raises(DataError, match="cannot be read: embedded null byte"):
        files.read_json("a\0b", DataError)
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    with pytest.raises(ConfigError, match=r"large\.json: larger than 256 MiB$"):
        files.read_json(path)

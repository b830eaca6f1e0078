"""Small files: whole or not at all, and one line where they cannot be."""

import json

import pytest

from megatron_most import files
from megatron_most.errors import ConfigError


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "a.json"
    for value in ({"word": "Käse"}, {"word": "fox"}):
        files.write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
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

"""Commit, search, verification and retention of checkpoint directories."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megatron_most.checkpointing import directory as directories
from megatron_most.errors import CheckpointError
from megatron_most.files import write_json


def make_checkpoint(run_dir: Path, step: int, content: bytes = b"weights" * 100) -> Path:
    target = directories.step_directory(run_dir, step)
    temporary = directories.temporary_directory(target)
    (temporary / "state").mkdir(parents=True)
    (temporary / "state" / "shard").write_bytes(content)
    write_json(temporary / "checkpoint.json", {"step": step})
    directories.write_manifest(temporary, directories.checksum(temporary, directories.list_files(temporary)))
    directories.commit(temporary, target)
    return target


def complete_steps(run_dir: Path) -> list[int | None]:
    return [directories.step_of(path) for path in directories.complete_checkpoints(run_dir)[0]]


def test_committed_checkpoint_is_found_and_verifies(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 100)
    assert path.name == "step_00000100"
    assert set(directories.read_manifest(path)) == {"checkpoint.json", "state/shard"}
    directories.verify_checksums(path)
    assert directories.resolve(tmp_path) == directories.resolve(path) == path
    assert not list(path.parent.glob(".tmp-*"))


def test_newest_is_by_step_not_by_time_or_name(tmp_path: Path) -> None:
    for step in (100_000_000, 20, 3):
        make_checkpoint(tmp_path, step)
    assert complete_steps(tmp_path) == [3, 20, 100_000_000]
    assert directories.resolve(tmp_path).name == "step_100000000"


def test_an_interrupted_save_is_not_a_checkpoint_and_is_cleaned(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    leftover = directories.temporary_directory(directories.step_directory(tmp_path, 2))
    (leftover / "state").mkdir(parents=True)
    assert complete_steps(tmp_path) == [1]
    directories.remove_leftovers(tmp_path)
    assert not leftover.exists()
    assert complete_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "state" / "shard").write_bytes(b"short"), "torn: state/shard has 5 bytes"),
        (lambda path: (path / "state" / "shard").unlink(), "incomplete: state/shard is missing"),
        (lambda path: (path / "manifest.json").unlink(), "incomplete: manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json: not readable as JSON"),
        (lambda path: (path / "manifest.json").write_text('{"a": 1}'), "not a checkpoint manifest"),
    ],
)
def test_damage_is_skipped_by_the_search_and_named(tmp_path: Path, damage: object, message: str) -> None:
    good = make_checkpoint(tmp_path, 1)
    bad = make_checkpoint(tmp_path, 2)
    damage(bad)
    assert directories.resolve(tmp_path) == good
    [problem] = directories.complete_checkpoints(tmp_path)[1]
    assert message in problem
    assert "step_00000002" in problem
    with pytest.raises(CheckpointError, match="step_00000002"):
        directories.resolve(bad)


def test_a_flipped_bit_is_found_by_content(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    shard = path / "state" / "shard"
    content = bytearray(shard.read_bytes())
    content[50] ^= 1
    shard.write_bytes(content)
    directories.verify_sizes(path)
    with pytest.raises(CheckpointError, match="corrupt: the content of state/shard"):
        directories.verify_checksums(path)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damage_names_the_newest_intact_checkpoint_and_how_to_go_on(tmp_path: Path) -> None:
    first, second, third, fourth = (make_checkpoint(tmp_path, step) for step in (1, 2, 3, 4))
    flip(third / "state" / "shard"), flip(second / "state" / "shard")
    with pytest.raises(CheckpointError, match="step_00000003: corrupt") as caught:
        directories.verify_checksums(third)
    line = str(caught.value)
    assert line.endswith(f"; to go on from {first}, which is intact: mv {third} {third}.damaged")
    assert "\n" not in line
    directories.verify_checksums(fourth)

    third.rename(f"{third}.damaged")
    assert complete_steps(tmp_path) == [1, 2, 4]


def test_damage_without_an_intact_checkpoint_says_so(tmp_path: Path) -> None:
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    flip(first / "state" / "shard"), flip(second / "checkpoint.json")
    with pytest.raises(
        CheckpointError, match="corrupt: the content of checkpoint.json .*; no earlier checkpoint is in"
    ):
        directories.verify_small_files(second)


@pytest.mark.parametrize("name", ["/dev/zero", "../other", "state/../../other", "a\0b"])
def test_a_manifest_names_only_files_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "manifest.json", {name: {"size": 0, "crc32": 0}})
    with pytest.raises(CheckpointError, match="which is not inside the checkpoint"):
        directories.verify_sizes(tmp_path)


def test_ranks_together_verify_every_file_once(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    (path / "state" / "shard").write_bytes(b"weights" * 99 + b"weighty")
    failures = 0
    for rank in range(3):
        try:
            directories.verify_checksums(path, rank, 3)
        except CheckpointError:
            failures += 1
    assert failures == 1


def test_retention_keeps_the_newest_and_never_counts_a_torn_one(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    (directories.step_directory(tmp_path, 4) / "manifest.json").unlink()
    directories.retain(tmp_path, keep_last=2)
    assert complete_steps(tmp_path) == [2, 3]


def test_retention_keeps_every_nth_step_for_ever(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        make_checkpoint(tmp_path, step)
        directories.retain(tmp_path, keep_last=2, keep_every=30)
    assert complete_steps(tmp_path) == [30, 60, 70]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step_000000{step}" for step in (30, 60, 70)
    ]


def test_retention_never_deletes_the_only_complete_one_nor_one_being_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    for step in (2, 3):
        (make_checkpoint(tmp_path, step) / "state" / "shard").unlink()
    being_written = directories.temporary_directory(directories.step_directory(tmp_path, 4))
    being_written.mkdir()
    directories.retain(tmp_path, keep_last=1)
    assert complete_steps(tmp_path) == [1]
    assert being_written.is_dir()


def test_what_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)

    def refuse(path: Path) -> None:
        if path.exists():
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(directories, "remove", refuse)
    with pytest.raises(CheckpointError, match=f"{first}: cannot be deleted: Permission denied"):
        directories.retain(tmp_path, keep_last=1)
    assert complete_steps(tmp_path) == [2]


@pytest.mark.parametrize("kind", ["a file", "a link", "a dangling link", "a folder"])
def test_leftovers_of_any_kind_are_removed(tmp_path: Path, kind: str) -> None:
    """Also those in the way of the next save and of the next deletion. What a link points to stays."""
    good = make_checkpoint(tmp_path, 1)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in (".tmp-step_00000002", ".tmp-old-step_00000001"):
        leftover = good.with_name(name)
        if kind == "a file":
            leftover.write_text("")
        elif kind == "a folder":
            (leftover / "state").mkdir(parents=True)
        else:
            leftover.symlink_to(kept if kind == "a link" else tmp_path / "nothing")
    make_checkpoint(tmp_path / "other", 1)
    directories.commit(directories.step_directory(tmp_path / "other", 1), good)  # deletes the one that is there
    directories.remove_leftovers(tmp_path)
    assert [path.name for path in good.parent.iterdir()] == [good.name]
    assert kept.is_dir()


def test_saving_a_step_again_replaces_a_torn_directory(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, 5) / "manifest.json").unlink()
    path = make_checkpoint(tmp_path, 5, b"new")
    assert (path / "state" / "shard").read_bytes() == b"new"
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name]


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        directories.resolve(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        directories.resolve(tmp_path)

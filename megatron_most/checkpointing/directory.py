"""Checkpoint directories: names, manifests, commit, search, retention.

``RUN_DIR/checkpoints/step_00000100/`` holds ``checkpoint.json`` (metadata), ``state/`` (Megatron's sharded tensors) and
``manifest.json`` (size and CRC32 of every file). It is written under a ``.tmp-`` name and renamed when complete, so a
directory named ``step_`` is complete unless the storage lost data, which the manifest reveals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path

from isal import isal_zlib

from megatron_most.errors import CheckpointError
from megatron_most.files import read_json, remove, sync_folder, write_json

STATE = "state"
"""Folder of the sharded tensors in a checkpoint."""

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_TENSORS = ".distcp"
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and the CRC32 of its content."""

    size: int
    crc32: int


def checkpoints_directory(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def step_directory(run_dir: str | Path, step: int) -> Path:
    return checkpoints_directory(run_dir) / f"step_{step:08d}"


def step_of(directory: Path) -> int | None:
    """The step in the name of a checkpoint directory, None for any other name."""
    match = _STEP_NAME.fullmatch(directory.name)
    return int(match.group(1)) if match else None


def temporary_directory(directory: Path) -> Path:
    return directory.with_name(TEMPORARY_PREFIX + directory.name)


def list_files(directory: Path) -> list[str]:
    """Every file below ``directory`` except the manifest, as sorted relative POSIX paths."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != MANIFEST)


def checksum(directory: Path, files: Iterable[str]) -> dict[str, FileEntry]:
    """Read ``files``, relative to ``directory``. Returns their sizes and checksums."""
    return {name: _entry(directory / name) for name in files}


def write_manifest(directory: Path, entries: dict[str, FileEntry]) -> None:
    """Write the manifest that makes ``directory`` complete."""
    content = {name: dataclasses.asdict(entries[name]) for name in sorted(entries)}
    write_json(directory / MANIFEST, content, CheckpointError)


def read_manifest(directory: Path) -> dict[str, FileEntry]:
    """The manifest of ``directory``.

    Raises:
        CheckpointError: it is missing or unreadable, or names a file outside ``directory``.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory}: incomplete: {MANIFEST} is missing")
    values = read_json(path, CheckpointError)
    try:
        entries = {name: FileEntry(**entry) for name, entry in values.items()}
    except (AttributeError, TypeError):
        raise CheckpointError(f"{path}: not a checkpoint manifest") from None
    for name in entries:
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise CheckpointError(f"{path}: names {name!r}, which is not inside the checkpoint")
    return entries


def verify_sizes(directory: Path) -> None:
    """Raise :class:`CheckpointError` unless every file of the manifest exists with its size. Does not read contents."""
    for name, entry in read_manifest(directory).items():
        try:
            size = (directory / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{directory}: incomplete: {name} is missing") from None
        if size != entry.size:
            raise CheckpointError(f"{directory}: torn: {name} has {size} bytes, the manifest says {entry.size}")


def verify_checksums(directory: Path, rank: int = 0, num_ranks: int = 1) -> None:
    """Raise :class:`CheckpointError` if the content of a file is not what was written.

    Each of ``num_ranks`` ranks reads every ``num_ranks``-th file, so that together they read each file once.
    """
    _verify(directory, sorted(read_manifest(directory))[rank::num_ranks])


def verify_small_files(directory: Path) -> None:
    """As :func:`verify_checksums`, for every file but those of tensors."""
    _verify(directory, [name for name in read_manifest(directory) if not name.endswith(_TENSORS)])


def _verify(directory: Path, names: Iterable[str]) -> None:
    damaged = _first_damaged(directory, names)
    if damaged is None:
        return
    message = f"{directory}: corrupt: the content of {damaged} does not match its checksum"
    if step_of(directory) is not None:
        good = _newest_intact_before(directory)
        aside = f"mv {directory} {directory.with_name(directory.name + '.damaged')}"
        message += f"; to go on from {good}, which is intact: {aside}" if good else "; no earlier checkpoint is intact"
    raise CheckpointError(message)


def _first_damaged(directory: Path, names: Iterable[str]) -> str | None:
    entries = read_manifest(directory)
    return next((name for name in names if _entry(directory / name) != entries[name]), None)


def _newest_intact_before(directory: Path) -> Path | None:
    """The newest earlier checkpoint of the same run, all of whose files have the content that was written."""
    step = step_of(directory) or 0
    for path in reversed(complete_checkpoints(directory.parent.parent)[0]):
        if (step_of(path) or 0) < step and path.parent == directory.parent:
            with contextlib.suppress(CheckpointError):
                if _first_damaged(path, read_manifest(path)) is None:
                    return path
    return None


def commit(temporary: Path, directory: Path) -> None:
    """Rename a complete checkpoint to its final name. A torn checkpoint of that name is deleted first."""
    if os.path.lexists(directory):
        _discard(directory)
    os.replace(temporary, directory)
    sync_folder(directory.parent)


def complete_checkpoints(run_dir: str | Path) -> tuple[list[Path], list[str]]:
    """The complete checkpoints of a run, oldest first, and one line for each incomplete one."""
    parent = checkpoints_directory(run_dir)
    candidates = [path for path in parent.iterdir() if step_of(path) is not None] if parent.is_dir() else []
    complete, problems = [], []
    for path in sorted(candidates, key=lambda path: step_of(path) or 0):
        try:
            verify_sizes(path)
            complete.append(path)
        except CheckpointError as error:
            problems.append(str(error))
    return complete, problems


def resolve(path: str | Path) -> Path:
    """The checkpoint at ``path``, or the newest complete one if ``path`` is a run directory.

    Raises:
        CheckpointError: there is no complete checkpoint; incomplete ones are named.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if step_of(path) is not None or (path / MANIFEST).is_file():
        verify_sizes(path)
        return path
    complete, problems = complete_checkpoints(path)
    if not complete:
        raise CheckpointError(
            f"{path}: holds no complete checkpoint" + (f" ({'; '.join(problems)})" if problems else "")
        )
    return complete[-1]


def remove_leftovers(run_dir: str | Path) -> None:
    """Delete what an interrupted save or deletion left behind. Only for the process that owns the run directory.

    Raises:
        CheckpointError: the storage refuses to delete it.
    """
    parent = checkpoints_directory(run_dir)
    for path in parent.glob(f"{TEMPORARY_PREFIX}*") if parent.is_dir() else ():
        try:
            remove(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be deleted: {error.strerror}") from error


def retain(run_dir: str | Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete complete checkpoints, except the ``keep_last`` newest and those of steps divisible by ``keep_every``.

    With ``keep_every`` 0, only the newest are kept. Checkpoints that are torn or being written are neither counted nor
    deleted.

    Raises:
        CheckpointError: the storage refuses to delete one.
    """
    complete, _ = complete_checkpoints(run_dir)
    for path in complete[:-keep_last]:
        if keep_every and (step_of(path) or 0) % keep_every == 0:
            continue
        try:
            _discard(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be deleted: {error.strerror}") from error


def _entry(path: Path) -> FileEntry:
    size, crc = 0, 0
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                size, crc = size + len(chunk), isal_zlib.crc32(chunk, crc)
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable: {error.strerror}") from None
    return FileEntry(size, crc)


def _discard(directory: Path) -> None:
    """Rename a checkpoint, so that no search finds it half deleted after a kill, and then delete it."""
    doomed = directory.with_name(f"{TEMPORARY_PREFIX}old-{directory.name}")
    remove(doomed)
    os.replace(directory, doomed)
    remove(doomed)

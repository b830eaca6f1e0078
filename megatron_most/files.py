"""Small files: written whole or not at all, and one-line errors for those that cannot be read or written."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_most.errors import ConfigError, MostError, first_line, shown

MAX_BYTES = 256 << 20
"""Bytes of the largest small file: the list of weights of a large model, or a tokenizer, has some tens of MiB."""


MAX_DEPTH = 100
"""Levels of lists and objects inside one another in JSON."""


@contextlib.contextmanager
def replacing(path: str | Path, raises: type[MostError] = ConfigError, *, durable: bool = False) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to. It becomes ``path`` at the end and is removed on an error.

    The folder is created if it is missing.

    Args:
        raises: the error for a file that the system refuses to write.
        durable: wait until the file and its name are on disk, so that a power failure takes neither.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise raises(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str, raises: type[MostError] = ConfigError) -> None:
    """Write a UTF-8 text file whole or not at all; it is on disk when this returns."""
    with replacing(path, raises, durable=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: object, raises: type[MostError] = ConfigError) -> None:
    """Write a JSON file as :func:`write_text` does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", raises)


def read_text(
    path: str | Path, raises: type[MostError] = ConfigError, *, limit: int = MAX_BYTES, errors: str = "strict"
) -> str:
    """Read a small UTF-8 text file.

    Args:
        errors: as for ``bytes.decode``.

    Raises:
        raises: the file is missing, is no regular file (reading a pipe could block forever), cannot be read, or holds
            more than ``limit`` bytes.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, raises, limit=limit).decode("utf-8", errors)


def read_bytes(path: str | Path, raises: type[MostError] = ConfigError, *, limit: int = MAX_BYTES) -> bytes:
    """The content of a small file, with the errors of :func:`read_text`."""
    with open_file(path, raises) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise raises(f"{path}: larger than {limit >> 20} MiB")
    return content


@contextlib.contextmanager
def open_file(path: str | Path, raises: type[MostError] = ConfigError) -> Iterator[BinaryIO]:
    """Open a regular file to read, with the errors of :func:`read_text`. Opening anything else could block forever."""
    try:
        # A pipe that was put in place after a look at the path must not block either.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise raises(f"{path}: not a regular file")
            yield file
    except FileNotFoundError:
        raise raises(f"{path}: no such file") from None
    except IsADirectoryError:
        raise raises(f"{path}: not a regular file") from None
    except OSError as error:
        raise raises(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # NUL in the path
        raise raises(f"{shown(str(path))}: cannot be read: {error}") from None


def read_json(path: str | Path, raises: type[MostError] = ConfigError) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        raises: as :func:`read_text`, or the file is not UTF-8 or not JSON (with the place), or holds anything but an
            object.
    """
    try:
        content = parse_json(read_text(path, raises))
    except ValueError as error:
        raise raises(f"{path}: not readable as JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise raises(f"{path}: must hold a JSON object")
    return content


def parse_json(text: str) -> Any:
    """The value of a JSON text from others. Raises :class:`ValueError` alone, also if it is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):  # the parser takes thousands of levels, on which those who use the value would recurse
        level = [entry for one in level for entry in _entries(one) if isinstance(entry, (dict, list))]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _entries(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def require_writable(path: str | Path) -> None:
    """Create ``path``'s folder and check that a file can be written there, before the work whose result it holds.

    Raises:
        ConfigError: ``path`` is a folder, or its folder cannot be created or written.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: cannot be written: no permission for its folder")


def remove(path: Path) -> None:
    """Delete a folder with all in it, a file, or a link but not what it points to. Nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename ``path`` to ``<name>.damaged``, or the first free ``<name>.damaged2``, ...; returns the new path."""
    names = (path.with_name(f"{path.name}.damaged{number if number > 1 else ''}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    return aside


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk: before that, a power failure can undo a rename."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

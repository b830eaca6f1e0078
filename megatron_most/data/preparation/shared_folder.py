"""For processes that share an output folder: locks, unique names, and a one-line error for a full disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_most.errors import DataError


@contextlib.contextmanager
def locked(path: str | Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold a file lock among all processes that see the file. It is released when the process ends.

    Yields False if another process holds it and ``wait`` is False. On a file system without locks every process gets
    it; work may then be done twice, with the same result.
    """
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, mode)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            # The previous holder may have removed the file, and others may lock a new file of that name.
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                yield True
                return


@contextlib.contextmanager
def one_line_when_the_disk_is_full(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}; finished shards are kept") from None


def hostname_and_pid() -> str:
    """A name that no other process with access to the folder has."""
    return f"{os.uname().nodename}.{os.getpid()}"

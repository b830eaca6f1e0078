"""What processes that write into one folder need of each other: locks, names, and one line when the disk is full."""

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
    """Hold a lock of a file among all processes that see it; it ends with the process, however that ends.

    Yields False when another holds it and we do not ``wait``. Where the file system knows no locks, everyone gets it:
    work may then be done twice, to the same result.
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
            # Whoever held it before us may have removed the file, and others now lock another one of that name.
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
    """What tells this process from all others that work in the same folder."""
    return f"{os.uname().nodename}.{os.getpid()}"

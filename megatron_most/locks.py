"""Locks between processes: of one machine, and of several that share a file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def locked(path: str | Path, *, shared: bool = False, wait: bool = True) -> Iterator[BinaryIO | None]:
    """Hold a lock on a file, which is created if it is missing.

    The lock ends with the block and with the process, however it ends. A child process that inherits the file's
    descriptor holds the lock, too. On a file system without locks every process gets it.

    Args:
        shared: with other processes that ask for a shared lock.
        wait: until other processes release it.

    Yields:
        The open file; None if another process holds the lock and ``wait`` is False.

    Raises:
        OSError: the file cannot be opened.
    """
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, mode)
            except BlockingIOError:
                yield None
                return
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            # The last holder may have removed the file. Another process may then hold a new file of that name.
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                yield file
                return

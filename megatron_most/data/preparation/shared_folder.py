"""What processes that write into one folder share: names, and one line when the disk is full."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_most.errors import DataError


@contextlib.contextmanager
def one_line_when_the_disk_is_full(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}; finished shards are kept") from None


def hostname_and_pid() -> str:
    """A name that no other process with access to the folder has."""
    return f"{os.uname().nodename}.{os.getpid()}"

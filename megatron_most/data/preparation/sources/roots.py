"""Which files a data set may name: only regular files inside the folders that the user gave."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from megatron_most.errors import DataError


class Roots:
    """The folders that may be read. A link is followed only if its target lies inside one of them."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self.folders = tuple(Path(os.path.realpath(folder)) for folder in folders)
        for folder in self.folders:
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder")
        self.resolve = functools.lru_cache(maxsize=1024)(self._resolve)  # many cuts are of one recording

    def _resolve(self, path: str | Path) -> Path:
        """The real path of a file; relative paths start at the first folder.

        Raises:
            DataError: the file lies outside the folders, does not exist, or is not a regular file.
        """
        if "\0" in str(path):
            raise DataError(f"{str(path)!r}: must be a path")
        real = Path(os.path.realpath(self.folders[0] / path))
        if not any(real.is_relative_to(folder) for folder in self.folders):
            raise DataError(f"{path}: lies outside of {', '.join(map(str, self.folders))}")
        try:
            is_regular = stat.S_ISREG(real.stat().st_mode)
        except OSError as error:
            raise DataError(f"{path}: no such file ({error.strerror})") from None
        if not is_regular:
            raise DataError(f"{path}: not a regular file")
        return real

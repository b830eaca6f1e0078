"""Lines of text files that may hold anything: too long, not UTF-8, with a byte order mark, compressed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_most.errors import DataError

MAX_LINE_BYTES = 16 << 20
"""Longer lines are refused, and never held in memory."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One line without its end; ``problem`` says why its text could not be had."""

    number: int
    text: str
    problem: str = ""


def read_lines(path: str | Path) -> Iterator[Line]:
    """Every line of a file, ``.gz`` or plain. Only a newline ends one: JSON text may hold U+2028 and the like as is.

    Raises:
        DataError: no such file, no regular file (a pipe would be waited for), or compressed data that is broken.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if number == 1:
                    raw = raw.removeprefix(_BYTE_ORDER_MARK)
                if len(raw) > MAX_LINE_BYTES:
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(MAX_LINE_BYTES)
                    yield Line(number, "", f"longer than {MAX_LINE_BYTES >> 20} MiB")
                    continue
                try:
                    yield Line(number, raw.decode("utf-8").rstrip("\r\n"))
                except UnicodeDecodeError:
                    yield Line(number, "", "not UTF-8")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: broken or cut off: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from None

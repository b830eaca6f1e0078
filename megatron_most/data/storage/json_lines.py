"""JSON-lines files from others (lines may be too long or not UTF-8, files compressed), and fields of their objects."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_most.errors import DataError, shown
from megatron_most.files import parse_json

MAX_LINE_BYTES = 16 << 20
"""Longer lines are refused and never read into memory as a whole."""

MAX_SECONDS = 1e9
"""More is no length of audio; 30 years."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One line without its newline; ``problem`` says why ``text`` is missing, if it is."""

    number: int
    text: str
    problem: str = ""


def read_lines(path: str | Path) -> Iterator[Line]:
    """Every line of a plain or ``.gz`` file. Only a newline ends a line: JSON strings may contain U+2028 and the like.

    Raises:
        DataError: the file is missing, unreadable, damaged, or not a regular file (reading a pipe could block forever).
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
        raise DataError(f"{path}: damaged or truncated: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from None


def parse_json_object(line: str) -> dict[str, Any]:
    """The JSON object in ``line``; :class:`DataError` if it is not one."""
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise DataError("must be a JSON object")
    return entry


def seconds_of(entry: dict[str, Any], field: str) -> float | None:
    """An optional field in seconds; :class:`DataError` unless it is a finite number of at least 0."""
    value = entry.get(field)
    if value is None:
        return None
    # The comparison fails for NaN, and takes whole numbers of any size.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_SECONDS:
        raise DataError(f"{field}={shown(value, 20)}: must be a number of seconds, at most {MAX_SECONDS:g}")
    return float(value)


def license_of(entry: dict[str, Any]) -> str | None:
    """The field ``license``, or ``licence``."""
    return text_of(entry, "license") or text_of(entry, "licence")


def text_of(entry: dict[str, Any], field: str) -> str | None:
    """An optional text field. Integers become text, because many data sets number their speakers."""
    value = entry.get(field)
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{field}={shown(value)}: must be text")

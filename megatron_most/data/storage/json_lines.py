"""JSON lines of files that may hold anything (too long, not UTF-8, compressed), and the fields of their objects."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_most.errors import DataError

MAX_LINE_BYTES = 16 << 20
"""Longer lines are refused, and never held in memory."""

MAX_SECONDS = 1e9
"""More is no length of audio; 30 years."""

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


def parse_json_object(line: str) -> dict[str, Any]:
    """A line of JSON as a dictionary; DataError when it is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise DataError("must be a JSON object")
    return entry


def seconds_of(entry: dict[str, Any], field: str) -> float | None:
    """A field of seconds; None where it is missing, DataError where it is no number of them."""
    value = entry.get(field)
    if value is None:
        return None
    # The comparison fails for NaN, and takes whole numbers of any size.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_SECONDS:
        raise DataError(f"{field}={repr(value)[:20]}: must be a number of seconds, at most {MAX_SECONDS:g}")
    return float(value)


def license_of(entry: dict[str, Any]) -> str | None:
    """The field ``license``, which may be spelled ``licence`` too."""
    return text_of(entry, "license") or text_of(entry, "licence")


def text_of(entry: dict[str, Any], field: str) -> str | None:
    """An optional text field; numbers (speakers often are) become text."""
    value = entry.get(field)
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{field}={value!r}: must be a text")

"""The number of samples in a FLAC stream (RFC 9639), taken from its last frame.

Encoders that write to a pipe leave 0 in the header. libsndfile cannot seek in such a stream, and it stops too early if
the number is too small.
"""

from __future__ import annotations

import functools
import re
from typing import BinaryIO

from megatron_most.errors import DataError

_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22", re.DOTALL)
"""A stream's first bytes: its name, and the head of the block STREAMINFO (section 8.2)."""

_TOTAL = slice(18, 26)
"""Bytes of a stream whose last 36 bits are its number of samples."""

_TOTAL_MASK = (1 << 36) - 1
_BLOCK = 1 << 20
_LAST_FRAME = 1 << 18
"""The last frame starts within this many bytes of the end."""

_ID3V1 = 128


def flac_streams(file: BinaryIO, start: int, size: int, name: str) -> list[tuple[bytes | range, ...]]:
    """What the decoder should read for each stream from byte ``start`` to ``size``, with the true length in its header.

    Raises:
        DataError: a stream whose last frame is not complete, or that holds fewer samples than its header says.
    """
    starts = _starts(file, start, size)
    if not starts:
        raise DataError(f"{name}: not readable as audio: FLAC without STREAMINFO")
    return [_pieces(file, at, end, name) for at, end in zip(starts, [*starts[1:], size], strict=True)]


def _starts(file: BinaryIO, start: int, size: int) -> list[int]:
    found = []
    overlap = 7
    for at in range(start, size, _BLOCK):
        file.seek(at)
        found += [at + match.start() for match in _START.finditer(file.read(_BLOCK + overlap))]
    return found


def _pieces(file: BinaryIO, start: int, end: int, name: str) -> tuple[bytes | range, ...]:
    file.seek(start)
    head = file.read(_TOTAL.stop)
    field = int.from_bytes(head[_TOTAL], "big")
    said = field & _TOTAL_MASK
    block_size = int.from_bytes(head[10:12], "big")  # the largest: the last one may be smaller
    file.seek(max(start, end - _LAST_FRAME))
    total = _total(file.read(end - file.tell()), block_size, said)
    if total is None:
        raise DataError(f"{name}: cut off: the last FLAC frame is not complete")
    if total < said:
        raise DataError(f"{name}: cut off: holds {total} samples of the {said} that its header tells of")
    corrected = (field - said + total).to_bytes(8, "big")
    return head[: _TOTAL.start] + corrected, range(start + _TOTAL.stop, end)


def _total(tail: bytes, block_size: int, said: int) -> int | None:
    """Number of the sample after the last one; None where no complete frame ends the stream.

    Args:
        tail: the last bytes of the stream.
        block_size: samples of every frame but the last, where they are all of one size.
        said: the total in the header. A frame that ends there is accepted without checking its CRC-16.
    """
    if tail[-_ID3V1:][:3] == b"TAG":
        tail = tail[:-_ID3V1]
    at = len(tail)
    while (at := max(tail.rfind(b"\xff\xf8", 0, at), tail.rfind(b"\xff\xf9", 0, at))) >= 0:
        # A frame of silence has 11 bytes.
        total = _end_of_frame(tail[at : at + 16].ljust(16, b"\0"), block_size)
        if total is not None and (total == said or _crc16(tail[at:]) == 0):
            return total
    return None


def _end_of_frame(head: bytes, block_size: int) -> int | None:
    """Number of the sample after a frame (section 9.1), from its first 16 bytes; None if they are no head of one."""
    code = head[2] >> 4
    number, at = _coded_number(head) if code else (None, 0)
    if number is None:
        return None
    if code in (6, 7):  # the size follows in 1 or 2 bytes
        samples = int.from_bytes(head[at : at + code - 5], "big") + 1
        at += code - 5
    else:
        samples = 192 if code == 1 else 144 << code if code < 6 else 1 << code
    at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)  # the sample rate
    if _crc8(head[:at]) != head[at]:
        return None
    is_number_of_sample = head[1] & 1
    return (number if is_number_of_sample else number * block_size) + samples


def _coded_number(head: bytes) -> tuple[int | None, int]:
    """The number of a frame or sample, coded as UTF-8 codes a character, and where it ends."""
    first = head[4]
    length = 8 - (~first & 0xFF).bit_length()
    if length == 0:
        return first, 5
    if length == 1 or length == 8:
        return None, 0
    number = first & (0x7F >> length)
    for byte in head[5 : 4 + length]:
        if byte >> 6 != 2:
            return None, 0
        number = number << 6 | byte & 0x3F
    return number, 4 + length


@functools.cache
def _crc_table(width: int, polynomial: int) -> list[int]:
    table = []
    for value in range(256):
        value <<= width - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> width - 1 else 0) & ((1 << width) - 1)
            value &= (1 << width) - 1
        table.append(value)
    return table


def _crc8(data: bytes) -> int:
    table, crc = _crc_table(8, 0x07), 0
    for byte in data:
        crc = table[crc ^ byte]
    return crc


def _crc16(data: bytes) -> int:
    """0 for a whole frame: its last two bytes are the sum of what precedes them."""
    table, crc = _crc_table(16, 0x8005), 0
    for byte in data:
        crc = (crc << 8 & 0xFF00) ^ table[crc >> 8 ^ byte]
    return crc

"""The frames of an MP3 file (MPEG audio, ISO 11172-3 and 13818-3), counted one by one.

Encoders that write to a pipe leave out the length. A decoder then estimates it from the bit rate of the first frame,
which is wrong for variable rates. In joined files, the length given is that of the first file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megatron_most.errors import DataError

MOST_JUNK = 4096
"""Bytes between or after frames that may be neither frames nor tags; they are skipped."""

_KBITS = {
    (1, 1): range(32, 449, 32),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Bit rates by version (1; 2 and 2.5) and layer, from index 1 on."""

_RATES = (44100, 48000, 32000)
_RATE_DIVISORS = {3: 1, 2: 2, 0: 4}
"""By the two bits of the version: 1, 2 and 2.5."""

_MIN_XING_FRAME = 192
"""Bytes of a frame that libmpg123 looks for a table in."""

_DECODER_DELAY = 529
"""Samples."""

_PEEK = 64
"""Bytes of a frame that contain its header and the start of a Xing or VBRI table."""


@dataclass(frozen=True)
class _Header:
    """What the first four bytes of a frame say. ``kind`` is equal for all frames of a stream."""

    kind: tuple[int, int, int, bool]
    """Version (1 or 2), layer, samples per second, mono."""

    size: int
    """Bytes, with the header."""

    @property
    def samples(self) -> int:
        version, layer, _, _ = self.kind
        return 384 if layer == 1 else 576 if (version, layer) == (2, 3) else 1152


@dataclass
class Mp3Stream:
    """Consecutive frames that one decoder can read.

    kind: as in :class:`_Header`, the same for all frames.
    first: the first :data:`_PEEK` bytes of the first frame.
    table: range of the frame that tells the decoder the length (Xing, Info); None without one.
    promised: number of frames according to a table; None if it does not say.
    frames: where the audio frames are; adjacent frames are one range.
    """

    kind: tuple[int, int, int, bool]
    first: bytes
    table: range | None
    promised: int | None
    frames: list[range]
    num_frames: int = 0

    def pieces(self) -> tuple[bytes | range, ...]:
        """What the decoder should read: a table with the true number of frames, then the frames."""
        if self.table is not None and self.promised == self.num_frames:
            return (self.table, *self.frames)
        if self.kind[1] != 3:  # libmpg123 looks for tables in layer III only; the rate of the others is constant
            return tuple(self.frames)
        return (_xing_frames(self.first, self.num_frames), *self.frames)


def is_mp3(file: BinaryIO) -> bool:
    """Whether two MPEG audio frames follow each other at the beginning, or not far behind ID3 tags."""
    start = 0
    while (end := tag_end(file, start)) > start:
        start = end
    for at in range(start, start + (MOST_JUNK if start else 1)):
        header = _header_at(file, at)
        if header is not None and _header_at(file, at + header.size) is not None:
            return True
    return False


def mp3_streams(file: BinaryIO, name: str) -> list[Mp3Stream]:
    """The streams of a file, with every frame counted.

    Raises:
        DataError: a frame that is not complete, fewer frames than a table tells of, or too many bytes that are no
            frames.
    """
    streams: list[Mp3Stream] = []
    kind: tuple[int, int, int, bool] | None = None
    for start, peek, header in _frames(file, name):
        table = _table(peek, header)
        frame = range(start, start + header.size)
        if table is not None or header.kind != kind:
            kind = header.kind
            if table is None:
                streams.append(Mp3Stream(kind, peek, None, None, []))
            else:
                # libmpg123 does not read VBRI tables.
                streams.append(Mp3Stream(kind, peek, None if table[0] == b"VBRI" else frame, table[1], []))
                continue
        stream = streams[-1]
        if not stream.num_frames:
            stream.first = peek
        stream.num_frames += 1
        if stream.frames and stream.frames[-1].stop == start:
            stream.frames[-1] = range(stream.frames[-1].start, frame.stop)
        else:
            stream.frames.append(frame)
    for stream in streams:
        # Some encoders count the frame of the table, too.
        if stream.promised is not None and stream.num_frames < stream.promised - 1:
            raise DataError(f"{name}: cut off: holds {stream.num_frames} MP3 frames of {stream.promised}")
    return [stream for stream in streams if stream.frames]


def _frames(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes, _Header]]:
    """Each frame: its place, its first bytes and its header."""
    size = file.seek(0, os.SEEK_END)
    at = junk = 0
    kind = None
    while at < size:
        file.seek(at)
        peek = file.read(_PEEK)
        header = _parse(peek)
        if header is not None and (header.kind == kind or _follows(file, at + header.size, size)):
            if at + header.size > size:
                raise DataError(f"{name}: cut off: {at + header.size - size} bytes of the last MP3 frame are missing")
            yield at, peek, header
            kind, junk = header.kind, 0
            at += header.size
        elif (end := tag_end(file, at)) > at:
            at = end
        else:
            at, junk = at + 1, junk + 1
            if junk > MOST_JUNK:
                raise DataError(f"{name}: damaged: no MP3 frame in {junk} bytes from byte {at - junk} on")


def _follows(file: BinaryIO, at: int, size: int) -> bool:
    """Whether a frame or a tag begins at ``at``, or the file ends: so what stands before was a frame."""
    return at == size or _header_at(file, at) is not None or tag_end(file, at) > at


def _header_at(file: BinaryIO, at: int) -> _Header | None:
    file.seek(at)
    return _parse(file.read(4))


def _parse(peek: bytes) -> _Header | None:
    """The header of a frame; None for other bytes, and for a frame of a free bit rate, whose size nothing tells."""
    if len(peek) < 4 or peek[0] != 0xFF or peek[1] & 0xE0 != 0xE0:
        return None
    divisor, layer = _RATE_DIVISORS.get(peek[1] >> 3 & 3), 4 - (peek[1] >> 1 & 3)
    bits, rate, padding = peek[2] >> 4, peek[2] >> 2 & 3, peek[2] >> 1 & 1
    if divisor is None or layer == 4 or bits in (0, 15) or rate == 3:
        return None
    version, sample_rate = min(divisor, 2), _RATES[rate] // divisor
    bit_rate = _KBITS[version, layer][bits - 1] * 1000
    if layer == 1:
        size = (12 * bit_rate // sample_rate + padding) * 4
    else:
        size = (72 if (version, layer) == (2, 3) else 144) * bit_rate // sample_rate + padding
    return _Header((version, layer, sample_rate, peek[3] >> 6 == 3), size)


def _table(peek: bytes, header: _Header) -> tuple[bytes, int | None] | None:
    """Name and number of frames of the table that a first frame may hold in place of sound; None without one."""
    if header.kind[1] != 3:
        return None
    at = _table_place(header)
    if peek[at : at + 4] in (b"Xing", b"Info"):
        has_count = int.from_bytes(peek[at + 4 : at + 8], "big") & 1
        return peek[at : at + 4], int.from_bytes(peek[at + 8 : at + 12], "big") if has_count else None
    if peek[36:40] == b"VBRI":
        return b"VBRI", int.from_bytes(peek[50:54], "big")
    return None


def _table_place(header: _Header) -> int:
    """Where a Xing table starts in its frame: after the header and the side information."""
    version, _, _, is_mono = header.kind
    return 4 + ((17 if is_mono else 32) if version == 1 else (9 if is_mono else 17))


def _xing_frames(first: bytes, num_frames: int) -> bytes:
    """Frames to put before ``first``: a Xing table with the number of frames, and one of silence.

    After a table libmpg123 drops :data:`_DECODER_DELAY` samples, and an encoder's delay. The table tells of one that
    makes these two exactly the silence. A first frame that refers to bits before it (of a stream that was cut out of
    another) must not find any: there the delay is dropped.
    """
    heads = [bytes((0xFF, first[1] | 1, bits << 4 | first[2] & 0x0C, first[3] & 0xC0)) for bits in range(1, 15)]
    head, header = next((head, found) for head in heads if (found := _parse(head)) and found.size >= _MIN_XING_FRAME)
    place = _table_place(header)
    side_information = first[4:6] if first[1] & 1 else first[6:8]  # after a checksum
    refers_back = side_information[0] or (header.kind[0] == 1 and side_information[1] >> 7)
    if refers_back:
        return (head + bytes(place - 4) + _xing(num_frames)).ljust(header.size, b"\0")
    lame = b"LAME3.100".ljust(21, b"\0") + (header.samples - _DECODER_DELAY << 12).to_bytes(3, "big")
    table = (head + bytes(place - 4) + _xing(num_frames + 1) + lame).ljust(header.size, b"\0")
    return table + head.ljust(header.size, b"\0")


def _xing(num_frames: int) -> bytes:
    has_number = 1
    return b"Xing" + has_number.to_bytes(4, "big") + num_frames.to_bytes(4, "big")


def tag_end(file: BinaryIO, at: int) -> int:
    """Where the tag ends that starts at ``at``; ``at`` itself where there is none."""
    file.seek(at)
    head = file.read(32)
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 0x80:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return at + 10 + size + (10 if head[5] & 0x10 else 0)
    if head[:3] == b"TAG":
        return at + 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        is_header = head[23] & 0x20
        return at + 32 + (int.from_bytes(head[12:16], "little") if is_header else 0)
    return at

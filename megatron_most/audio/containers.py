"""The streams that an audio file holds, with their true lengths.

libsndfile trusts the length in a header and stops there. That length can be unknown, an estimate, or that of the first
of several joined files, and the file may have been cut off since. This module finds the real end of each stream and
shows libsndfile the stream with the right length in its header.
"""

from __future__ import annotations

import bisect
import io
import itertools
import os
from collections.abc import Buffer
from dataclasses import dataclass
from typing import BinaryIO, Literal

from megatron_most.audio.flac import flac_streams
from megatron_most.audio.mp3 import is_mp3, mp3_streams, tag_end
from megatron_most.errors import DataError

_MAX_PADDING = 4096
"""Bytes that may follow the audio without being a chunk."""

Pieces = tuple[bytes | range, ...]
"""Consecutive content: literal bytes, and ranges of a file."""

_OGG_HEADER = 27
_OGG_FIRST_PAGE, _OGG_LAST_PAGE = 0x02, 0x04


@dataclass(frozen=True)
class _Chunked:
    """A container made of chunks: a name, a length, and that many bytes.

    magic: first bytes of the file.
    first: offset of the first chunk.
    name_size, length_size: bytes of a chunk's name and length.
    audio: how the name of the chunk with the samples starts.
    total: offset of the length of the whole file; None if there is none.
    counted: bytes of name and length that a chunk's length includes.
    alignment: the size of a chunk is padded to a multiple of this.
    """

    magic: bytes
    first: int
    name_size: int
    length_size: int
    order: Literal["little", "big"]
    audio: bytes
    total: int | None
    counted: int = 0
    alignment: int = 2

    @property
    def min_unknown(self) -> int:
        """Programs that write to a pipe cannot fill in the length of the audio: they leave 0, or one from here on."""
        return 0x7FFF0000 if self.length_size == 4 else 0x7FFF_FFFF_FFFF_0000

    def with_lengths(self, start: int, size: int) -> Pieces:
        """A file of ``size`` bytes whose samples go from ``start`` to its end, with the lengths that say so."""

        def length(value: int) -> bytes:
            return min(value, (1 << 8 * self.length_size) - 1).to_bytes(self.length_size, self.order)

        pieces: list[bytes | range] = []
        at = 0
        if self.total is not None:
            # RF64 is RIFF with its lengths elsewhere.
            pieces += [self.magic, range(len(self.magic), self.total), length(size - (8 if self.counted == 0 else 0))]
            at = self.total + self.length_size
        audio = length(size - start + self.counted)
        return (*pieces, range(at, start - self.length_size), audio, range(start, size))


_WAV = _Chunked(b"RIFF", 12, 4, 4, "little", b"data", 4)
_AIFF = _Chunked(b"FORM", 12, 4, 4, "big", b"SSND", 4)
_W64 = _Chunked(b"riff\x2e\x91\xcf\x11", 40, 16, 8, "little", b"data", 16, counted=24, alignment=8)
_CAF = _Chunked(b"caff", 8, 4, 8, "big", b"data", None, alignment=1)


@dataclass(frozen=True)
class Stream:
    """One stream of a file, as libsndfile should see it.

    is_exact: whether the decoder returns exactly as many samples as the header says. MP3 decoders may drop frames that
        refer to bits before the start.
    """

    pieces: Pieces
    is_exact: bool = True


def streams_of(file: BinaryIO, name: str) -> list[Stream]:
    """The streams of a seekable audio file. A file of a format unknown here is one stream.

    Raises:
        DataError: a file that was cut off or is damaged.
    """
    file.seek(0)
    start = file.read(16)
    size = file.seek(0, os.SEEK_END)
    is_riff = start.startswith((b"RIFF", b"RF64")) and start[8:12] == b"WAVE"
    chunked = _WAV if is_riff else next((one for one in (_AIFF, _W64, _CAF) if start.startswith(one.magic)), None)
    if chunked is not None:
        return [Stream(_chunks(file, size, name, chunked))]
    if start.startswith(b".snd"):
        return [Stream(_au(start, size, name))]
    if start.startswith(b"OggS"):
        return [Stream((link,)) for link in _ogg_links(file, size, name)]
    tagged = tag_end(file, 0)
    file.seek(tagged)
    if file.read(4) == b"fLaC":
        return [Stream(pieces) for pieces in flac_streams(file, tagged, size, name)]
    if is_mp3(file):
        return [Stream(stream.pieces(), is_exact=False) for stream in mp3_streams(file, name)]
    return [Stream((range(size),))]


class StreamView(io.RawIOBase):
    """A stream of a file as a file of its own."""

    def __init__(self, file: BinaryIO, stream: Stream) -> None:
        self._file = file
        self._pieces = stream.pieces
        self._starts = list(itertools.accumulate((len(piece) for piece in stream.pieces), initial=0))
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._starts[-1]}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        """Fill the whole buffer, from several pieces if needed: libsndfile takes a short read for the end."""
        target = memoryview(buffer).cast("B")
        count = 0
        index = bisect.bisect_right(self._starts, self._at) - 1
        while count < len(target) and index < len(self._pieces):
            piece, skip = self._pieces[index], self._at - self._starts[index]
            size = min(len(piece) - skip, len(target) - count)
            if isinstance(piece, range):
                self._file.seek(piece.start + skip)
                content = self._file.read(size)
            else:
                content = piece[skip : skip + size]
            target[count : count + len(content)] = content
            count += len(content)
            self._at += len(content)
            if len(content) < size:
                break
            index += 1
        return count


def _chunks(file: BinaryIO, size: int, name: str, chunked: _Chunked) -> Pieces:
    """Find the chunk with the samples and check that it is complete and followed by nothing else than chunks."""
    file.seek(chunked.first)
    rf64_size = 0
    while len(head := file.read(chunked.name_size + chunked.length_size)) == chunked.name_size + chunked.length_size:
        start = file.tell()
        length = int.from_bytes(head[chunked.name_size :], chunked.order) - chunked.counted
        if head.startswith(b"ds64"):
            rf64_size = int.from_bytes(file.read(16)[8:], "little")
        if head.startswith(chunked.audio):
            length = rf64_size if length == 0xFFFFFFFF and rf64_size else length
            return _audio_chunk(file, start, length, size, name, chunked)
        if length < 0:
            raise DataError(f"{name}: damaged: a chunk of {length} bytes at byte {start}")
        file.seek(min(start + length + -length % chunked.alignment, size))
    return (range(size),)


def _audio_chunk(file: BinaryIO, start: int, length: int, size: int, name: str, chunked: _Chunked) -> Pieces:
    rest = size - start
    is_chunk = _is_chunk(file, min(start + length + -length % chunked.alignment, size))
    if length > rest and length >= chunked.min_unknown or length <= 0 and rest and not is_chunk:
        return chunked.with_lengths(start, size)
    if length > rest:
        raise DataError(f"{name}: cut off: {length - rest} of {length} bytes of audio are missing")
    if rest - length > _MAX_PADDING and not is_chunk:
        raise DataError(f"{name}: its header tells of {length} bytes of audio, {rest - length} bytes more follow")
    return (range(size),)


def _au(start: bytes, size: int, name: str) -> Pieces:
    """Sun's format: offset and length of the samples; a length of all ones means unknown."""
    offset, length = int.from_bytes(start[4:8], "big"), int.from_bytes(start[8:12], "big")
    if 0 < length < 0xFFFFFFFF:
        missing = offset + length - size
        if missing > 0:
            raise DataError(f"{name}: cut off: {missing} of {length} bytes of audio are missing")
        if missing < -_MAX_PADDING:
            raise DataError(f"{name}: its header tells of {length} bytes of audio, {-missing} bytes more follow")
    return (range(8), b"\xff\xff\xff\xff", range(12, size))


def _is_chunk(file: BinaryIO, at: int) -> bool:
    file.seek(at)
    name = file.read(4)
    return len(name) == 4 and name.isascii() and name.decode("ascii").isprintable()


def _ogg_links(file: BinaryIO, size: int, name: str) -> list[range]:
    """The links of a chain (RFC 3533, section 4): each starts with first pages and ends with a page marked as last."""
    starts: list[int] = []
    flags, at = _OGG_LAST_PAGE, 0
    while at < size:
        file.seek(at)
        page = file.read(max(_OGG_HEADER, _MAX_PADDING))
        if not page.startswith(b"OggS"):
            skip = page.find(b"OggS")
            if skip < 0 and size - at > _MAX_PADDING:
                raise DataError(f"{name}: damaged: no Ogg page in {len(page)} bytes from byte {at} on")
            at = at + skip if skip >= 0 else size
            continue
        if page[5:6] and page[5] & _OGG_FIRST_PAGE and not (starts and flags & _OGG_FIRST_PAGE):
            if not flags & _OGG_LAST_PAGE:
                break
            starts.append(at)
        segments = page[_OGG_HEADER : _OGG_HEADER + page[26]] if len(page) >= _OGG_HEADER else b""
        end = at + _OGG_HEADER + len(segments) + sum(segments)
        if len(page) < _OGG_HEADER or len(segments) < page[26] or end > size:
            flags = 0
            break
        flags, at = page[5], end
    if not starts or not flags & _OGG_LAST_PAGE:
        raise DataError(f"{name}: cut off: the end of the Ogg stream is missing")
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], size], strict=True)]

"""Whether a WAV or Ogg file is all there. libsndfile reads one that was cut off as a shorter one, without a word."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_most.errors import DataError

_STREAMED_WAV = 0x7FFF0000
"""Programs that write WAV to a pipe cannot go back to fill in the size of the data and leave one from here on."""

_MOST_PADDING = 4096
"""Bytes that may follow the audio of a WAV file and mean nothing."""

_OGG_HEADER = 27
_OGG_MAX_PAGE = _OGG_HEADER + 255 + 255 * 255
_OGG_LAST_PAGE = 0x04


def check_is_whole(audio: str | Path | BinaryIO, name: str) -> None:
    """Raise :class:`DataError` for WAV or Ogg that was cut off; leaves an open file at its beginning."""
    with _opened(audio) as file:
        start = file.read(12)
        size = file.seek(0, os.SEEK_END)
        if start[:4] == b"RIFF" and start[8:] == b"WAVE":
            _check_wav(file, size, name)
        elif start[:4] == b"OggS":
            _check_ogg(file, size, name)


@contextlib.contextmanager
def _opened(audio: str | Path | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(audio, (str, Path)):
        with open(audio, "rb") as file:
            yield file
    else:
        audio.seek(0)
        yield audio
        audio.seek(0)


def _check_wav(file: BinaryIO, size_on_disk: int, name: str) -> None:
    """The header says how many bytes of audio there are to be; after them comes nothing, or a chunk with a name."""
    file.seek(12)
    while len(header := file.read(8)) == 8:
        chunk, size = header[:4], int.from_bytes(header[4:], "little")
        end = file.tell() + size
        if chunk == b"data":
            if end > size_on_disk and size < _STREAMED_WAV:
                raise DataError(f"{name}: cut off: {end - size_on_disk} of {size} bytes of audio are missing")
            file.seek(end + size % 2)
            following = file.read(4)
            is_chunk = following.isascii() and following.decode("ascii").isprintable()
            if size_on_disk - end > _MOST_PADDING and not is_chunk:
                raise DataError(
                    f"{name}: its header tells of {size} bytes of audio, {size_on_disk - end} bytes more follow"
                )
            return
        file.seek(size + size % 2, os.SEEK_CUR)


def _check_ogg(file: BinaryIO, size: int, name: str) -> None:
    """The last page of a stream is marked as such, and has to be there to its last byte (RFC 3533, section 6)."""
    file.seek(max(0, size - _OGG_MAX_PAGE))
    tail = file.read()
    at = tail.rfind(b"OggS")
    page = io.BytesIO(tail[at:] if at >= 0 else b"")
    header = page.read(_OGG_HEADER)
    if len(header) == _OGG_HEADER and header[5] & _OGG_LAST_PAGE:
        segments = page.read(header[26])
        if len(segments) == header[26] and len(page.read(sum(segments))) == sum(segments):
            return
    raise DataError(f"{name}: cut off: the end of the Ogg stream is missing")

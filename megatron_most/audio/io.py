"""Audio files <-> float32 mono waveforms ``[T]``.

What libsndfile reads: WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF and more, at any rate and channel count.
soundfile and soxr belong to the extra ``audio`` and are imported where they are used: a manifest can be checked, and a
command can print its help, without them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from megatron_most.audio.containers import Stream, StreamView, streams_of
from megatron_most.errors import DataError
from megatron_most.files import replacing

if TYPE_CHECKING:
    import soundfile

DURATION_TOLERANCE = 0.1
"""Seconds by which audio may be longer or shorter than stated: manifests round, resamplers trim, encoders pad."""

SAMPLE_RATES = (1000, 768000)
"""Lowest and highest sample rate that is accepted."""

MAX_AMPLITUDE = 16.0
"""Lossy codecs overshoot -1..1 a little. Far larger values mean another scale, such as 16-bit integers as floats."""

MAX_SAMPLES = 1 << 28
"""Samples that are read at once: 4.7 h at 16 kHz. A small file can hold days of silence."""

_BLOCK = 1 << 20
"""Samples of all channels that are decoded at once."""


def read_audio(
    audio: str | Path | BinaryIO,
    sample_rate: int,
    *,
    offset: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
) -> np.ndarray:
    """Read audio as float32 ``[T]`` mono at ``sample_rate``.

    Args:
        audio: a path, or a file object that can seek.
        offset: where to start, in seconds.
        duration: how much to read, in seconds; None reads to the end.
        channel: the channel to read; None averages all channels.

    Raises:
        DataError: the file is missing, unreadable, cut off, empty, shorter than its header says or than the requested
            segment, longer than :data:`MAX_SAMPLES`, or has samples that are not finite or far outside -1..1.
    """
    [waveform] = stream_audio(audio, sample_rate, offset=offset, duration=duration, channel=channel)
    return waveform


def stream_audio(
    audio: str | Path | BinaryIO,
    sample_rate: int,
    *,
    offset: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
    chunk: int | None = None,
) -> Iterator[np.ndarray]:
    """As :func:`read_audio`, in pieces of ``chunk`` samples (at ``sample_rate``; the last one shorter).

    Audio that fits in one piece equals the result of :func:`read_audio`. Longer audio is never held in memory whole,
    so an error in the file may be raised after some pieces.
    """
    import soundfile

    name = str(audio) if isinstance(audio, (str, Path)) else "audio"
    if isinstance(audio, (str, Path)) and not Path(audio).is_file():
        reason = "not a regular file" if Path(audio).exists() else "no such audio file"
        raise DataError(f"{name}: {reason}")
    try:
        with open(audio, "rb") if isinstance(audio, (str, Path)) else contextlib.nullcontext(audio) as file:
            is_named = isinstance(audio, (str, Path))
            streams = _streams_of_path(name, _state(os.fstat(file.fileno()))) if is_named else streams_of(file, name)
            blocks = _blocks(file, name, streams, offset, duration, channel)
            pieces = _converted(blocks, name, sample_rate, chunk)
            first, second = next(pieces), next(pieces, None)
            if second is None:
                yield first
            else:
                yield from _rechunked(itertools.chain([first, second], pieces), chunk)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip() or "broken or cut off"  # libsndfile does not always know
        raise DataError(f"{name}: not readable as audio: {reason}") from None
    except OSError as error:
        raise DataError(f"{name}: not readable: {error.strerror}") from None


@functools.lru_cache(maxsize=16)
def _streams_of_path(path: str, state: tuple[int, ...]) -> list[Stream]:
    """Cached until the file's ``state`` changes: many utterances are segments of one long recording."""
    with open(path, "rb") as file:
        return streams_of(file, path)


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _blocks(
    file: BinaryIO, name: str, streams: list[Stream], offset: float, duration: float | None, channel: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Mono blocks of the segment, each with its sample rate, which may differ between joined files.

    Checks that the file contains what its header says and what was requested.
    """
    import soundfile

    seconds = given = 0.0
    for stream in streams:
        with soundfile.SoundFile(StreamView(file, stream)) as sound:
            rate = sound.samplerate
            if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
                raise DataError(f"{name}: a rate of {rate} Hz is outside {SAMPLE_RATES[0]}..{SAMPLE_RATES[1]} Hz")
            if channel is not None and channel >= sound.channels:
                raise DataError(f"{name}: has {sound.channels} channels, channel {channel} is asked for")
            start = max(0, round((offset - seconds) * rate))
            seconds += sound.frames / rate
            wanted = None if duration is None else round((duration - given) * rate)
            if start >= sound.frames or wanted == 0:
                continue
            for samples in _decoded(sound, name, start, wanted, stream.is_exact):
                given += len(samples) / rate
                yield rate, samples[:, channel] if channel is not None else samples.mean(axis=1)
    if not seconds:
        raise DataError(f"{name}: holds no audio samples")
    if not given:
        raise DataError(f"{name}: holds {seconds:.2f} s, nothing at offset {offset:.2f} s")
    if duration is not None and given < duration - DURATION_TOLERANCE:
        raise DataError(f"{name}: holds {given:.2f} s from {offset:.2f} s on, {duration:.2f} s are expected")


def _decoded(
    sound: soundfile.SoundFile, name: str, start: int, wanted: int | None, is_exact: bool
) -> Iterator[np.ndarray]:
    """Samples ``[T, channels]`` of one stream from ``start`` to its end, or ``wanted`` of them."""
    size = max(1, _BLOCK // sound.channels)
    if sound.seekable():
        sound.seek(start)  # also to 0: MP3 decodes to other last bits without
    else:
        for passed in range(0, start, size):
            sound.read(min(size, start - passed))
    count = 0
    while wanted is None or count < wanted:
        samples = sound.read(size if wanted is None else min(size, wanted - count), dtype="float32", always_2d=True)
        if not len(samples):
            break
        count += len(samples)
        peak = np.abs(samples).max()
        if not np.isfinite(peak):
            raise DataError(f"{name}: holds samples that are not finite numbers")
        if peak > MAX_AMPLITUDE:
            raise DataError(f"{name}: holds samples up to {peak:g}; they must be in -1..1")
        yield samples
    tolerance = 0 if is_exact else round(DURATION_TOLERANCE * sound.samplerate)
    if wanted is None and count < sound.frames - start - tolerance:
        raise DataError(
            f"{name}: cut off: holds {count} samples of the {sound.frames - start} that its header promises"
        )


def _converted(
    blocks: Iterator[tuple[int, np.ndarray]], name: str, sample_rate: int, chunk: int | None
) -> Iterator[np.ndarray]:
    """The blocks at ``sample_rate``. Audio that fits in a ``chunk`` is resampled at once, as without a ``chunk``."""
    for rate, group in itertools.groupby(blocks, key=lambda block: block[0]):
        samples = (block for _, block in group)
        # One chunk and a sample more tell whether there is a second chunk.
        most = MAX_SAMPLES * rate // max(rate, sample_rate)
        first, rest = _take(samples, (most if chunk is None else -(-chunk * rate // sample_rate)) + 1)
        if chunk is None and rest is not None:
            raise DataError(f"{name}: longer than {most / rate / 3600:.1f} h; read parts of it (offset and duration)")
        if rest is None:
            waveform = first if rate == sample_rate else resample(first, rate, sample_rate)
            if not len(waveform):
                raise DataError(f"{name}: too short to resample to {sample_rate} Hz")
            yield np.ascontiguousarray(waveform, dtype=np.float32)
        else:
            yield from _resampled(itertools.chain([first, rest], samples), rate, sample_rate)


def _take(blocks: Iterator[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The first ``count`` samples, and what was read beyond them; None when that was all there is."""
    taken: list[np.ndarray] = []
    total = 0
    for block in blocks:
        taken.append(block)
        total += len(block)
        if total >= count:
            whole = np.concatenate(taken)
            return whole[:count], whole[count:]
    return np.concatenate(taken) if len(taken) != 1 else taken[0], None


def _resampled(blocks: Iterator[np.ndarray], rate: int, sample_rate: int) -> Iterator[np.ndarray]:
    if rate == sample_rate:
        yield from blocks
        return
    import soxr

    stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def resample(waveform: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """``waveform`` ``[T]`` of ``rate`` samples per second at ``sample_rate``."""
    import soxr

    return soxr.resample(waveform, rate, sample_rate)


def _rechunked(blocks: Iterator[np.ndarray], size: int | None) -> Iterator[np.ndarray]:
    """The same samples in pieces of ``size``; None makes one piece of them."""
    buffer = np.zeros(0, dtype=np.float32)
    for block in [np.concatenate(list(blocks))] if size is None else blocks:
        buffer = np.concatenate([buffer, block])
        while size is not None and len(buffer) >= size:
            yield np.ascontiguousarray(buffer[:size], dtype=np.float32)
            buffer = buffer[size:]
    if len(buffer):
        yield np.ascontiguousarray(buffer, dtype=np.float32)


def write_wav(path: str | Path, waveform: np.ndarray, sample_rate: int) -> None:
    """Write ``waveform [T]`` as 16-bit mono WAV; values beyond -1..1 are clipped. Appears whole or not at all."""
    import soundfile

    with replacing(path) as temporary:
        soundfile.write(temporary, np.clip(waveform, -1.0, 1.0), sample_rate, format="WAV", subtype="PCM_16")

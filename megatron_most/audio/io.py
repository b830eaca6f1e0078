"""Audio files <-> float32 mono waveforms ``[T]``.

What libsndfile reads: WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF and more, at any rate and channel count.
soundfile and soxr belong to the extra ``audio`` and are imported where they are used: a manifest can be checked, and a
command can print its help, without them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from megatron_most.audio.containers import check_is_whole
from megatron_most.errors import DataError
from megatron_most.files import replacing

if TYPE_CHECKING:
    import soundfile

DURATION_TOLERANCE = 0.1
"""Seconds by which a length may miss what is said of it: manifests round, resamplers trim, encoders pad."""

SAMPLE_RATES = (1000, 768000)
"""Lowest and highest rate of a file that is believed."""

MAX_AMPLITUDE = 16.0
"""Lossy codecs overshoot -1..1 a little; far more is audio in another scale, such as 16-bit integers as floats."""

_BLOCK = 1 << 20
"""Samples of all channels that are decoded at once, whatever length a header claims."""


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
        audio: a file, or an open one that can seek.
        offset: where to start, in seconds.
        duration: how much to read, in seconds; None reads to the end.
        channel: the only channel to read; None averages all.

    Raises:
        DataError: the file is missing, unreadable, cut off, shorter than its header or than the segment asked for,
            empty, or holds values that are not numbers or far outside -1..1.
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

    Audio that fits one piece is one, equal to what :func:`read_audio` gives; longer audio is never held whole. What is
    wrong with a file may show only at a later piece.
    """
    import soundfile

    name = str(audio) if isinstance(audio, (str, Path)) else "audio"
    if isinstance(audio, (str, Path)) and not Path(audio).is_file():
        reason = "not a regular file" if Path(audio).exists() else "no such audio file"
        raise DataError(f"{name}: {reason}")
    try:
        check_is_whole(audio, name)
        with soundfile.SoundFile(audio) as file:
            yield from _pieces(file, name, sample_rate, offset, duration, channel, chunk)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip() or "broken or cut off"  # libsndfile does not always know
        raise DataError(f"{name}: not readable as audio: {reason}") from None
    except (TypeError, ValueError) as error:  # soundfile's answer to names that end in .raw
        raise DataError(f"{name}: not readable as audio: {error}") from None
    except OSError as error:
        raise DataError(f"{name}: not readable: {error.strerror}") from None


def _pieces(
    file: soundfile.SoundFile,
    name: str,
    sample_rate: int,
    offset: float,
    duration: float | None,
    channel: int | None,
    chunk: int | None,
) -> Iterator[np.ndarray]:
    rate = file.samplerate
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        raise DataError(f"{name}: a rate of {rate} Hz is not believable")
    if channel is not None and channel >= file.channels:
        raise DataError(f"{name}: has {file.channels} channels, channel {channel} is asked for")
    start = round(offset * rate)
    if start >= file.frames:
        if file.frames == 0:
            raise DataError(f"{name}: holds no audio samples")
        raise DataError(f"{name}: holds {file.frames / rate:.2f} s, nothing at offset {offset:.2f} s")
    file.seek(start)  # also to 0: MP3 decodes to other last bits without
    wanted = None if duration is None else round(duration * rate)
    blocks = _blocks(file, name, channel, file.frames - start, wanted, offset)
    # One chunk and a sample more tell whether there is a second chunk.
    first, rest = _take(blocks, None if chunk is None else -(-chunk * rate // sample_rate) + 1)
    if rest is None:
        waveform = first if rate == sample_rate else resample(first, rate, sample_rate)
        if not len(waveform):
            raise DataError(f"{name}: too short to resample to {sample_rate} Hz")
        yield np.ascontiguousarray(waveform, dtype=np.float32)
    else:
        yield from _rechunked(_resampled(itertools.chain([first, rest], blocks), rate, sample_rate), chunk)


def _blocks(
    file: soundfile.SoundFile, name: str, channel: int | None, promised: int, wanted: int | None, offset: float
) -> Iterator[np.ndarray]:
    """Mono blocks up to the end, or up to ``wanted`` samples; checks that the file holds what it says."""
    size = max(1, _BLOCK // file.channels)
    count = 0
    while wanted is None or count < wanted:
        samples = file.read(size if wanted is None else min(size, wanted - count), dtype="float32", always_2d=True)
        if not len(samples):
            break
        count += len(samples)
        peak = np.abs(samples).max()
        if not np.isfinite(peak):
            raise DataError(f"{name}: holds samples that are not finite numbers")
        if peak > MAX_AMPLITUDE:
            raise DataError(f"{name}: holds samples up to {peak:g}; they must be in -1..1")
        yield samples[:, channel] if channel is not None else samples.mean(axis=1)
    rate = file.samplerate
    if wanted is not None and count / rate < wanted / rate - DURATION_TOLERANCE:
        raise DataError(
            f"{name}: holds {count / rate:.2f} s from {offset:.2f} s on, {wanted / rate:.2f} s are expected"
        )
    if wanted is None and count < promised:
        raise DataError(f"{name}: cut off: holds {count} samples of the {promised} that its header promises")
    if not count:
        raise DataError(f"{name}: holds no audio samples")


def _take(blocks: Iterator[np.ndarray], count: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The first ``count`` samples (None: all), and what was read beyond them; None when that was all there is."""
    taken: list[np.ndarray] = []
    total = 0
    for block in blocks:
        taken.append(block)
        total += len(block)
        if count is not None and total >= count:
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


def _rechunked(blocks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples in pieces of ``size``."""
    buffer = np.zeros(0, dtype=np.float32)
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while len(buffer) >= size:
            yield np.ascontiguousarray(buffer[:size], dtype=np.float32)
            buffer = buffer[size:]
    if len(buffer):
        yield np.ascontiguousarray(buffer, dtype=np.float32)


def write_wav(path: str | Path, waveform: np.ndarray, sample_rate: int) -> None:
    """Write ``waveform [T]`` as 16-bit mono WAV; values beyond -1..1 are clipped. Appears whole or not at all."""
    import soundfile

    with replacing(path) as temporary:
        soundfile.write(temporary, np.clip(waveform, -1.0, 1.0), sample_rate, format="WAV", subtype="PCM_16")

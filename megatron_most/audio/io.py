"""Audio files <-> float32 mono waveforms ``[T]``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

from megatron_most.errors import DataError
from megatron_most.files import replacing

DURATION_TOLERANCE = 0.1
"""Seconds of audio that may be missing at the end of a segment: manifests round, resamplers trim."""

_STREAMED = 0x7FFF0000
"""Programs that write WAV to a pipe cannot go back to fill in the size of the data and leave one from here on."""


def read_audio(path: str | Path, sample_rate: int, *, offset: float = 0.0, duration: float | None = None) -> np.ndarray:
    """Read WAV, FLAC or Ogg at any rate and channel count as float32 ``[T]`` mono at ``sample_rate``.

    Args:
        offset: where to start, in seconds.
        duration: how much to read, in seconds; None reads to the end.

    Raises:
        DataError: the file is missing, unreadable, cut off (a cut Ogg file cannot be told from a whole one), empty,
            shorter than the segment asked for, or holds values that are not numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such audio file")
    try:
        _check_wav_is_whole(path)
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            start = round(offset * rate)
            if start >= file.frames:
                raise DataError(f"{path}: holds {file.frames / rate:.2f} s, nothing at offset {offset:.2f} s")
            file.seek(start)
            samples = file.read(-1 if duration is None else round(duration * rate), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip() or "broken or cut off"  # libsndfile does not always know
        raise DataError(f"{path}: not readable as audio: {reason}") from None
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from None
    if not len(samples):
        raise DataError(f"{path}: holds no audio samples")
    if duration is not None and len(samples) / rate < duration - DURATION_TOLERANCE:
        seconds = len(samples) / rate
        raise DataError(f"{path}: holds {seconds:.2f} s from {offset:.2f} s on, {duration:.2f} s are expected")
    if not np.isfinite(samples).all():
        raise DataError(f"{path}: holds samples that are not finite numbers")
    waveform = samples.mean(axis=1)
    if rate != sample_rate:
        waveform = soxr.resample(waveform, rate, sample_rate)
        if not len(waveform):
            raise DataError(f"{path}: too short to resample to {sample_rate} Hz")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def _check_wav_is_whole(path: Path) -> None:
    """libsndfile reads a WAV file that was cut off as a shorter one; its header knows how long it was to be."""
    with open(path, "rb") as file:
        form = file.read(12)
        if form[:4] != b"RIFF" or form[8:] != b"WAVE":
            return
        size_on_disk = os.fstat(file.fileno()).st_size
        while len(header := file.read(8)) == 8:
            name, size = header[:4], int.from_bytes(header[4:], "little")
            if name == b"data":
                missing = file.tell() + size - size_on_disk
                if missing > 0 and size < _STREAMED:
                    raise DataError(f"{path}: cut off: {missing} of {size} bytes of audio are missing")
                return
            file.seek(size + size % 2, os.SEEK_CUR)


def write_wav(path: str | Path, waveform: np.ndarray, sample_rate: int) -> None:
    """Write ``waveform [T]`` as 16-bit mono WAV; values beyond -1..1 are clipped. Appears whole or not at all."""
    with replacing(path) as temporary:
        soundfile.write(temporary, np.clip(waveform, -1.0, 1.0), sample_rate, format="WAV", subtype="PCM_16")

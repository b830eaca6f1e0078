"""Every kind of file that ffmpeg writes, to a file or to a pipe, is read to the samples that ffmpeg reads."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_most.audio import read_audio

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the program ffmpeg"),
]

RATES, CHANNELS = (8000, 16000, 22050, 44100, 48000), (1, 2)

KINDS = {
    "mp3 cbr": "-c:a libmp3lame -f mp3",
    "mp3 cbr without a table": "-c:a libmp3lame -write_xing 0 -f mp3",
    "mp3 vbr": "-c:a libmp3lame -q:a 4 -f mp3",
    "mp3 vbr without a table": "-c:a libmp3lame -q:a 4 -write_xing 0 -f mp3",
    "mp3 vbr without tags": "-c:a libmp3lame -q:a 7 -write_xing 0 -id3v2_version 0 -f mp3",
    "mp2": "-c:a mp2 -f mp2",
    "flac": "-f flac",
    "flac of large blocks": "-frame_size 16384 -f flac",
    "flac of 24 bits": "-sample_fmt s32 -f flac",
    "vorbis": "-c:a libvorbis -f ogg",
    "wav": "-f wav",
    "wav of 24 bits": "-c:a pcm_s24le -f wav",
    "wav of floats": "-c:a pcm_f32le -f wav",
    "wav a-law": "-c:a pcm_alaw -f wav",
    "wav mu-law": "-c:a pcm_mulaw -f wav",
    "aiff": "-f aiff",
    "au": "-f au",
    "w64": "-f w64",
    "caf": "-f caf",
}
NOT_OF_8_KHZ = {"mp2"}
UNKNOWN_TO_FFMPEG = {"aiff", "w64"}
"""Formats that ffmpeg does not read back from where it wrote them to a pipe."""


def sound(rate: int, channels: int) -> np.ndarray:
    # A multiple of 4 samples: W64 pads its chunks to 8 bytes, which nothing tells from sound in a file from a pipe.
    time = np.arange(round(1.3 * rate) // 4 * 4) / rate
    noise = np.random.default_rng(rate).uniform(-0.2, 0.2, (len(time), channels))
    return time[:, None] / 2 * (0.5 * np.sin(2 * np.pi * 300 * time)[:, None] + noise)


def ffmpeg(*arguments: object) -> bytes:
    command = ["ffmpeg", "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_ffmpeg_is_read_to_the_same_samples(tmp_path, kind):
    differing = {}
    for rate in RATES[kind in NOT_OF_8_KHZ :]:
        for channels in CHANNELS:
            original = tmp_path / f"{rate}_{channels}.wav"
            soundfile.write(original, sound(rate, channels), rate)
            arguments = ("-i", original, *KINDS[kind].split(), "-bitexact")
            whole, piped = tmp_path / "whole", tmp_path / "piped"
            ffmpeg(*arguments, whole)
            piped.write_bytes(ffmpeg(*arguments, "pipe:1"))
            for path in (whole, piped):
                reference = whole if kind in UNKNOWN_TO_FFMPEG else path
                decoded = np.frombuffer(ffmpeg("-i", reference, "-f", "f32le", "-"), np.float32).reshape(-1, channels)
                differing[path.name, rate, channels] = _differing(path, rate, decoded.mean(axis=1))
    print(f"{kind}: differing samples by file: {differing}")
    assert not any(differing.values())


def _differing(path: Path, rate: int, expected: np.ndarray) -> int:
    found = read_audio(path, rate)
    common = min(len(found), len(expected))
    return abs(len(found) - len(expected)) + int((np.abs(found[:common] - expected[:common]) > 1e-3).sum())


@pytest.mark.parametrize("codec", ["libvorbis", "libopus", "libmp3lame", "flac"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_joined_files_are_as_long_as_their_parts(tmp_path, codec, channels):
    parts = []
    for rate in (48000, 16000):
        soundfile.write(tmp_path / "a.wav", sound(rate, channels), rate)
        container = {"flac": "flac", "libmp3lame": "mp3"}.get(codec, "ogg")
        ffmpeg("-i", tmp_path / "a.wav", "-c:a", codec, "-f", container, tmp_path / "part")
        parts.append((tmp_path / "part").read_bytes())
    (tmp_path / "joined").write_bytes(b"".join(parts))
    assert abs(len(read_audio(tmp_path / "joined", 16000)) - 2 * 1.3 * 16000) <= 2

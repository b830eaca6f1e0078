"""What the rest of the project asks of an audio codec.

Shape letters: T samples, C codebooks, F codec frames. Codes are ``[F, C]``, frame after frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_most.errors import ConfigError


class AudioCodec(Protocol):
    """A neural codec: waveform <-> one code per codebook and frame."""

    name: str
    """What a user calls the codec: a pretrained model's name, or a file's stem."""

    fingerprint: str
    """SHA-256 of the weights file: codes of two codecs mix only when it is equal."""

    num_codebooks: int
    codebook_size: int
    sample_rate: int
    """Samples per second, of what is encoded and of what is decoded."""

    samples_per_frame: int

    @property
    def frame_rate(self) -> float:
        """Codec frames per second."""
        ...

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """Waveform ``[T]`` float32 in -1..1 at ``sample_rate`` -> codes ``[F, C]`` int64.

        F is T / ``samples_per_frame``, rounded up; DataError when the codec gives another number. The same waveform
        gives the same codes whatever was encoded before.
        """
        ...

    @property
    def min_samples(self) -> int:
        """Shortest waveform that codes are worth having of: one frame, or more where the codec needs more."""
        ...

    def batch_shape(self, num_samples: int) -> tuple[int, int]:
        """Rows and samples of the batches in which waveforms of this length are encoded."""
        ...

    def encode_batch(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """:meth:`encode` of each, to the bit, in one go. They share a :meth:`batch_shape` and fit its rows."""
        ...

    def to(self, device: str) -> None:
        """Compute on ``cpu``, ``cuda`` or ``cuda:N`` from now on. Another device may round codes otherwise."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes ``[F, C]`` -> waveform ``[F * samples_per_frame]`` float32.

        Codes of the first codebooks only are decoded as well as these alone can be.

        Raises DataError for codes outside their codebook, and when the codec gives too few samples.
        """
        ...


def codec_file(name_or_path: str | Path) -> Path | None:
    """The file that is meant by what a user gives as a codec; None when it is the name of a pretrained model.

    Raises:
        ConfigError: a file is meant, but there is none.
    """
    text = str(name_or_path)
    if not text.endswith(".nemo"):
        return None
    if not Path(text).is_file():
        raise ConfigError(f"codec {text}: no such file")
    return Path(text)


def file_fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""The interface of an audio codec.

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
    """The name of a pretrained model, or the stem of a file."""

    fingerprint: str
    """SHA-256 of the weights file; codes of codecs with different fingerprints cannot be mixed."""

    num_codebooks: int
    codebook_size: int
    sample_rate: int
    """Samples per second of the waveforms that are encoded and decoded."""

    samples_per_frame: int

    @property
    def frame_rate(self) -> float:
        """Codec frames per second."""
        ...

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """Waveform ``[T]`` float32 in -1..1 at ``sample_rate`` -> codes ``[F, C]`` int64.

        F is T / ``samples_per_frame``, rounded up; DataError if the codec returns another number. The codes depend on
        the waveform only.
        """
        ...

    @property
    def min_samples(self) -> int:
        """Samples of the shortest waveform that is encoded: one frame, or more if the codec needs more."""
        ...

    def batch_shape(self, num_samples: int) -> tuple[int, int]:
        """Rows and samples of the batches in which waveforms of this length are encoded."""
        ...

    def encode_batch(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The same codes as :meth:`encode` of each. All share a :meth:`batch_shape`, and there are at most its rows."""
        ...

    def to(self, device: str) -> None:
        """Move to ``cpu``, ``cuda`` or ``cuda:N``. Codes may differ between devices where rounding does."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes ``[F, C]`` -> waveform ``[F * samples_per_frame]`` float32.

        C may be less than ``num_codebooks``: the first codebooks alone are decoded, at lower quality.

        Raises DataError for codes outside their codebook, and if the codec returns too few samples.
        """
        ...


def codec_file(name_or_path: str | Path) -> Path | None:
    """The path of a ``.nemo`` file; None for the name of a pretrained model.

    Raises:
        ConfigError: the file does not exist.
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

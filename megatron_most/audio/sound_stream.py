"""Sound of codec frames that come one after another, without clicks where the pieces meet.

Shape letters: T samples, C codebooks, F codec frames. Codes are ``[F, C]``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from megatron_most.audio.codec import AudioCodec

_MOST_BEFORE = 64
"""Frames before a piece that are decoded with it, at most."""

_MOST_AFTER = 8
"""Frames after a piece that are waited for, at most."""

_SILENT = 1e-6
"""A difference below this share of the peak is rounding."""


@dataclass(frozen=True)
class Reach:
    """How many frames before and after a frame its sound depends on; if not ``is_exact``, on others as well."""

    before: int
    after: int
    is_exact: bool


@functools.lru_cache(maxsize=8)
def reach_of(codec: AudioCodec, num_codebooks: int) -> Reach:
    """Tried out, not read off a configuration: any layer of any codec may look ahead or far back."""
    half, random = _MOST_BEFORE, np.random.default_rng(0)
    first, second = random.integers(0, codec.codebook_size, (2, 2 * half, num_codebooks))
    edge = half * codec.samples_per_frame
    sound = codec.decode(first)

    def changed(*codes: np.ndarray) -> np.ndarray:
        difference = np.abs(codec.decode(np.concatenate(codes)) - sound)
        return np.flatnonzero(difference > _SILENT * np.abs(sound).max())

    earliest = changed(first[:half], second[half:]).min(initial=edge)
    latest = changed(second[:half], first[half:]).max(initial=edge - 1)
    after = -(-max(0, edge - int(earliest)) // codec.samples_per_frame)
    before = -(-max(0, int(latest) + 1 - edge) // codec.samples_per_frame)
    is_exact = before < _MOST_BEFORE and after <= _MOST_AFTER
    return Reach(before, min(after, _MOST_AFTER), is_exact)


class SoundStream:
    """Decodes frames as they come. The pieces, one after another, are the sound of all frames decoded at once.

    A piece is decoded with the frames that its samples depend on. If the codec looks further than that, the pieces are
    close to that sound only, so each is blended into the next over one frame.

    Args:
        before: codes of the sound that the stream continues, if any.
    """

    def __init__(self, codec: AudioCodec, num_codebooks: int, before: np.ndarray | None = None) -> None:
        self._codec = codec
        self._reach = reach_of(codec, num_codebooks)  # type: ignore[arg-type]  # codecs are hashed by identity
        self._codes = np.zeros((0, num_codebooks), dtype=np.int64) if before is None else before
        self._num_given = len(self._codes)
        self._tail = np.zeros(0, dtype=np.float32)

    def add(self, codes: np.ndarray) -> np.ndarray:
        """Take frames ``[F, C]``; return the samples ``[T]`` that no later frame will change."""
        self._codes = np.concatenate([self._codes, codes])
        return self._sound(len(self._codes) - self._reach.after - (not self._reach.is_exact))

    def finish(self) -> np.ndarray:
        """The rest ``[T]``: there are no more frames."""
        return self._sound(len(self._codes))

    def _sound(self, stop: int) -> np.ndarray:
        """Of the frames up to ``stop`` that were not given yet."""
        if stop <= self._num_given:
            return np.zeros(0, dtype=np.float32)
        size, start = self._codec.samples_per_frame, self._num_given
        first = max(0, start - self._reach.before)
        sound = self._codec.decode(self._codes[first:])
        piece = sound[(start - first) * size : (stop - first) * size].copy()
        overlap = len(self._tail)
        weight = np.arange(overlap, dtype=np.float32) / max(1, overlap)
        piece[:overlap] = (1 - weight) * self._tail + weight * piece[:overlap]
        if not self._reach.is_exact:
            self._tail = sound[(stop - first) * size : (stop - first + 1) * size]
        # What no piece needs any more is forgotten.
        self._codes, self._num_given = self._codes[first:], stop - first
        return piece

"""How codec frames become positions of the sequence, and back.

Shape letters: C codebooks, F codec frames, n positions of an audio segment. Codes are ``[F, C]``, frame after frame.

Codebook k of frame f stands at step f, or f + k in a delayed layout (MusicGen, arXiv 2306.05284):

    frame   one position per step: its id is ``frame`` as long as a frame begins there, then ``tail`` (``frame + 1``);
            its codes stand beside it, ``NO_CODE`` where a codebook has none
    flat    one position per code, step after step: its id is ``frame + 1 + k * codebook_size + code``
"""

from __future__ import annotations

import numpy as np

NO_CODE = -1
"""A code that a position does not have, or that is hidden from the input."""


class CodecLayout:
    """Lays out and reads segments of audio, without the ids that begin and end them.

    Args:
        name: ``frame``, ``frame_delay``, ``flat`` or ``flat_delay``.
        frame_id: the id ``frame``.
    """

    def __init__(self, name: str, frame_id: int, num_codebooks: int, codebook_size: int) -> None:
        if name not in ("frame", "frame_delay", "flat", "flat_delay"):
            raise ValueError(f"codec_layout={name!r}: must be frame, frame_delay, flat or flat_delay")
        self.uses_side_codes = name.startswith("frame")
        self.delay = int(name.endswith("_delay"))
        self.frame_id, self.num_codebooks, self.codebook_size = frame_id, num_codebooks, codebook_size

    def symbols(self, num_frames: int) -> np.ndarray:
        """``[n]``: what stands at each position of ``num_frames`` frames.

        ``flat``: the codebook of the code. ``frame``: 0 for ``frame`` and 1 for ``tail``. 0 begins a frame in both.
        """
        if self.uses_side_codes:
            return (np.arange(self._num_steps(num_frames)) >= num_frames).astype(np.int64)
        return self._cells(num_frames)[1]

    def ids_of(self, symbol: int) -> range:
        """The ids that may stand where ``symbol`` does."""
        if self.uses_side_codes:
            return range(self.frame_id + symbol, self.frame_id + symbol + 1)
        first = self.frame_id + 1 + symbol * self.codebook_size
        return range(first, first + self.codebook_size)

    def encode(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``codes [F, C]`` -> ids ``[n]`` and side codes ``[n, C]``; the latter all ``NO_CODE`` in ``flat`` layouts.

        Raises:
            ValueError: the codes have another shape, there are none, or one lies outside its codebook.
        """
        codes = np.asarray(codes, dtype=np.int64)
        if codes.ndim != 2 or codes.shape[1] < self.num_codebooks or not len(codes):
            raise ValueError(f"codes have shape {list(codes.shape)}, must be [frames, {self.num_codebooks} or more]")
        codes = codes[:, : self.num_codebooks]
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(f"codes range from {codes.min()} to {codes.max()}, must be 0 to {self.codebook_size - 1}")
        symbols = self.symbols(len(codes))
        side_codes = np.full((len(symbols), self.num_codebooks), NO_CODE)
        frame, codebook = self._cells(len(codes))
        if self.uses_side_codes:
            side_codes[frame + self.delay * codebook, codebook] = codes[frame, codebook]
            return self.frame_id + symbols, side_codes
        return self.frame_id + 1 + codebook * self.codebook_size + codes[frame, codebook], side_codes

    def decode(self, ids: np.ndarray, side_codes: np.ndarray | None = None) -> np.ndarray:
        """The inverse of :meth:`encode`, for ids in the layout's order: codes ``[F, C]``."""
        ids = np.asarray(ids, dtype=np.int64)
        begins_frame = ids == self.frame_id if self.uses_side_codes else ids < self.ids_of(0).stop
        num_frames = int(begins_frame.sum())
        frame, codebook = self._cells(num_frames)
        codes = np.empty((num_frames, self.num_codebooks), dtype=np.int64)
        if self.uses_side_codes:
            codes[frame, codebook] = np.asarray(side_codes)[frame + self.delay * codebook, codebook]
        else:
            codes[frame, codebook] = ids - self.frame_id - 1 - codebook * self.codebook_size
        return codes

    def has_code(self, position: int, num_frames: int) -> np.ndarray:
        """``[C]`` bool: the codebooks with a side code at ``position``, where ``num_frames`` have begun with it."""
        frame = position - self.delay * np.arange(self.num_codebooks)
        return (frame >= 0) & (frame < num_frames)

    def _num_steps(self, num_frames: int) -> int:
        return num_frames + self.delay * (self.num_codebooks - 1) if num_frames else 0

    def _cells(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame and codebook of every code ``[F * C]``, in the order of steps and then of codebooks."""
        frame, codebook = np.divmod(np.arange(num_frames * self.num_codebooks), self.num_codebooks)
        order = np.lexsort((codebook, frame + self.delay * codebook))
        return frame[order], codebook[order]

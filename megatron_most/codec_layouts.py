"""How codec frames become positions of the sequence, and back.

Shape letters: C codebooks, F codec frames, n positions of an audio segment, t input steps, b rows. Codes are
``[F, C]``, frame after frame.

Two layouts, each with and without a delay:

    frame        one position per frame, its C codes beside the id
    frame_delay  the same, codebook k one position later than codebook k - 1: a frame's codes are predicted one after
                 another, each seeing those before it. C - 1 positions of the id ``tail`` end the segment.
    flat         one position per code, frame after frame
    flat_delay   the codes of ``flat`` in the order of the delayed grid: step t holds codebook k of frame t - k

The delay pattern is that of MusicGen (Copet et al. 2023, https://arxiv.org/abs/2306.05284).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np

from megatron_most.errors import ConfigError, DataError

NO_CODE = -1
"""Code of a position that holds no codec frame, or whose frame is hidden from the input."""


class CodecLayout(ABC):
    """One way to lay codec frames out. ``frame`` is the id from which on ids belong to the layout."""

    uses_side_codes: bool
    """Whether codes travel beside the ids: one row of C codes for each position of :attr:`side_code_ids`."""

    is_delayed = False
    """Whether side codes may be missing (``NO_CODE``) at a position that holds some."""

    num_ids: int
    """Ids the layout needs beyond ``frame``."""

    leading_ids: range
    """Each frame has exactly one position with an id of these, in the order of the frames."""

    side_code_ids: range
    """Ids of the positions that hold side codes."""

    def __init__(self, frame: int, num_codebooks: int, codebook_size: int) -> None:
        self.frame = frame
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size

    @abstractmethod
    def encode(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``codes [F, C]`` -> ids ``[n]`` and side codes ``[n, C]``, int64 (``NO_CODE`` where the layout uses none)."""

    @abstractmethod
    def decode(self, ids: np.ndarray, side_codes: np.ndarray | None) -> np.ndarray:
        """The inverse of :meth:`encode`: ids ``[n]`` and side codes ``[n, C]`` -> codes ``[F, C]``.

        Layouts that use no side codes ignore them. Raises :class:`DataError` when the ids are no whole number of frames
        in the layout's order.
        """

    def encode_open(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`encode`, of audio that goes on: the positions before the one that begins frame F.

        In a delay pattern they lack the last codes of the last frames, which come later.
        """
        return self.encode(codes)

    @abstractmethod
    def whole_frames(self, ids: np.ndarray, side_codes: np.ndarray) -> np.ndarray:
        """Codes ``[f, C]`` of the frames that the first positions of a segment, ``ids [n]``, hold completely."""

    @abstractmethod
    def num_positions(self, num_frames: int) -> int:
        """Positions that ``num_frames`` frames take."""

    @abstractmethod
    def steps(self, num_positions: int) -> np.ndarray:
        """``[n]`` int64: the step of each position of a whole segment; what is read together is hidden together."""

    @abstractmethod
    def allowed_next(self, position: int, num_frames: int) -> tuple[range, bool]:
        """Ids allowed at ``position`` (0 is the first after ``begin_of_audio``), and whether audio may end there.

        ``num_frames`` is the number of :attr:`leading_ids` before ``position``.
        """

    def has_code(self, position: int, num_frames, codebooks):
        """Which ``codebooks`` have a code at ``position``; ``num_frames`` counts leading ids up to and with it.

        Arguments are integers, or tensors that broadcast against each other.
        """
        return (codebooks >= 0) & (num_frames >= 0)

    def _num_frames(self, codes: np.ndarray) -> int:
        num_frames, num_codebooks = codes.shape
        assert num_codebooks == self.num_codebooks, f"codes {codes.shape} are not [frames, {self.num_codebooks}]"
        return num_frames

    def is_leading(self, ids):
        """True where an id is one of :attr:`leading_ids`; NumPy arrays and torch tensors alike."""
        return (ids >= self.leading_ids.start) & (ids < self.leading_ids.stop)

    def holds_side_codes(self, ids):
        """True where an id is one of :attr:`side_code_ids`; NumPy arrays and torch tensors alike."""
        return (ids >= self.side_code_ids.start) & (ids < self.side_code_ids.stop)


class FrameLayout(CodecLayout):
    """One position per codec frame: the id is ``frame``, the C codes travel beside it."""

    num_ids = 0
    uses_side_codes = True

    def __init__(self, frame: int, num_codebooks: int, codebook_size: int) -> None:
        super().__init__(frame, num_codebooks, codebook_size)
        self.leading_ids = self.side_code_ids = range(frame, frame + 1)

    def encode(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(self._num_frames(codes), self.frame, dtype=np.int64), codes.astype(np.int64)

    def decode(self, ids: np.ndarray, side_codes: np.ndarray | None) -> np.ndarray:
        wrong = np.flatnonzero(ids != self.frame)
        if wrong.size:
            raise DataError(f"audio position {wrong[0]} holds id {ids[wrong[0]]}, not frame ({self.frame})")
        assert side_codes is not None, "a layout with side codes gets them"
        return np.array(side_codes)

    def whole_frames(self, ids: np.ndarray, side_codes: np.ndarray) -> np.ndarray:
        return side_codes[: ids.size]

    def num_positions(self, num_frames: int) -> int:
        return num_frames

    def steps(self, num_positions: int) -> np.ndarray:
        return np.arange(num_positions)

    def allowed_next(self, position: int, num_frames: int) -> tuple[range, bool]:
        return self.leading_ids, position > 0


class FrameDelayLayout(FrameLayout):
    """F positions of ``frame`` and C - 1 of ``tail``; codebook k of frame f stands at position f + k.

    Without an id of its own for the tail a model that generates could not know that its audio has ended before the
    last codebook has.
    """

    num_ids = 1
    is_delayed = True

    def __init__(self, frame: int, num_codebooks: int, codebook_size: int) -> None:
        super().__init__(frame, num_codebooks, codebook_size)
        _require_codebooks("frame_delay", num_codebooks)
        self.tail = frame + 1
        self.side_code_ids = range(frame, frame + 2)

    def encode(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        num_frames = self._num_frames(codes)
        num_positions = self.num_positions(num_frames)
        ids = np.full(num_positions, self.tail, dtype=np.int64)
        ids[:num_frames] = self.frame
        side_codes = np.full((num_positions, self.num_codebooks), NO_CODE, dtype=np.int64)
        for codebook in range(self.num_codebooks):
            side_codes[codebook : codebook + num_frames, codebook] = codes[:, codebook]
        return ids, side_codes

    def decode(self, ids: np.ndarray, side_codes: np.ndarray | None) -> np.ndarray:
        num_frames = max(0, ids.size - self.num_codebooks + 1)
        expected, _ = self.encode(np.zeros((num_frames, self.num_codebooks), dtype=np.int64))
        if ids.size != expected.size or num_frames == 0 < ids.size:
            raise DataError(f"{ids.size} audio positions: {self.num_codebooks} delayed codebooks need more")
        wrong = np.flatnonzero(ids != expected)
        if wrong.size:
            name = "frame" if expected[wrong[0]] == self.frame else "tail"
            raise DataError(f"audio position {wrong[0]} holds id {ids[wrong[0]]}, not {name} ({expected[wrong[0]]})")
        assert side_codes is not None, "a layout with side codes gets them"
        return self.whole_frames(ids, side_codes)

    def encode_open(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, side_codes = self.encode(codes)
        return ids[: len(codes)], side_codes[: len(codes)]

    def whole_frames(self, ids: np.ndarray, side_codes: np.ndarray) -> np.ndarray:
        num_frames = max(0, ids.size - self.num_codebooks + 1)
        frame, codebook = np.ogrid[:num_frames, : self.num_codebooks]
        return side_codes[frame + codebook, codebook]

    def num_positions(self, num_frames: int) -> int:
        return num_frames + self.num_codebooks - 1 if num_frames else 0

    def allowed_next(self, position: int, num_frames: int) -> tuple[range, bool]:
        if position == 0:
            return self.leading_ids, False
        if num_frames == position:
            return self.side_code_ids, False
        if position < self.num_positions(num_frames):
            return range(self.tail, self.tail + 1), False
        return range(0), True

    def has_code(self, position: int, num_frames, codebooks):
        return (codebooks <= position) & (codebooks > position - num_frames)


class FlatLayout(CodecLayout):
    """One position per code, frame-major, with one id range per codebook."""

    uses_side_codes = False

    def __init__(self, frame: int, num_codebooks: int, codebook_size: int) -> None:
        super().__init__(frame, num_codebooks, codebook_size)
        self.num_ids = num_codebooks * codebook_size
        self.first_code_id = frame + 1
        self.leading_ids = self._ids_of(0)
        self.side_code_ids = range(0)

    def encode(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codebook, frame = self._order(self._num_frames(codes))
        ids = self.first_code_id + codebook * self.codebook_size + codes[frame, codebook].astype(np.int64)
        return ids, np.full((ids.size, self.num_codebooks), NO_CODE, dtype=np.int64)

    def decode(self, ids: np.ndarray, side_codes: np.ndarray | None) -> np.ndarray:
        if ids.size % self.num_codebooks:
            raise DataError(f"{ids.size} audio positions are no whole number of {self.num_codebooks}-code frames")
        codebook, frame = self._order(ids.size // self.num_codebooks)
        values = ids - self.first_code_id - codebook * self.codebook_size
        wrong = np.flatnonzero((values < 0) | (values >= self.codebook_size))
        if wrong.size:
            position = wrong[0]
            raise DataError(
                f"audio position {position} holds id {ids[position]}, which is not in codebook {codebook[position]}"
            )
        codes = np.empty((ids.size // self.num_codebooks, self.num_codebooks), dtype=np.int64)
        codes[frame, codebook] = values
        return codes

    def whole_frames(self, ids: np.ndarray, side_codes: np.ndarray) -> np.ndarray:
        codebook, code = np.divmod(ids - self.first_code_id, self.codebook_size)
        # A codebook's codes come in the order of the frames, and the last codebook's come last.
        in_order = [code[codebook == one] for one in range(self.num_codebooks)]
        return np.stack([codes[: in_order[-1].size] for codes in in_order], axis=1)

    def num_positions(self, num_frames: int) -> int:
        return num_frames * self.num_codebooks

    def steps(self, num_positions: int) -> np.ndarray:
        return self._order(num_positions // self.num_codebooks)[1]

    def allowed_next(self, position: int, num_frames: int) -> tuple[range, bool]:
        codebook = position % self.num_codebooks
        return self._ids_of(codebook), codebook == 0 < position

    def _ids_of(self, codebook: int, count: int = 1) -> range:
        start = self.first_code_id + codebook * self.codebook_size
        return range(start, start + count * self.codebook_size)

    def _order(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Codebook and frame of each position."""
        frame, codebook = np.divmod(np.arange(num_frames * self.num_codebooks), self.num_codebooks)
        return codebook, frame


class FlatDelayLayout(FlatLayout):
    """The positions of :class:`FlatLayout`, step after step: step t holds codebook k of frame t - k, if any."""

    def __init__(self, frame: int, num_codebooks: int, codebook_size: int) -> None:
        super().__init__(frame, num_codebooks, codebook_size)
        _require_codebooks("flat_delay", num_codebooks)

    def encode_open(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        longer = np.concatenate([codes, np.zeros((self.num_codebooks, codes.shape[1]), dtype=codes.dtype)])
        ids, side_codes = self.encode(longer)
        stop = self._start(len(codes))
        return ids[:stop], side_codes[:stop]

    def steps(self, num_positions: int) -> np.ndarray:
        codebook, frame = self._order(num_positions // self.num_codebooks)
        return codebook + frame

    def allowed_next(self, position: int, num_frames: int) -> tuple[range, bool]:
        # As long as the audio goes on: step t holds codebooks 0 .. min(t, C - 1), and C(C + 1)/2 codes come before
        # step C.
        count = self.num_codebooks
        past_growing = position - count * (count + 1) // 2
        step = count + past_growing // count if past_growing >= 0 else (math.isqrt(8 * position + 1) - 1) // 2
        codebook = position - self._start(step)
        if num_frames == step + (codebook > 0):
            # A step that begins with codebook 1 has no frame of its own: the audio has ended one step before.
            return self._ids_of(codebook, 2 if codebook == 0 < step else 1), False
        # The audio has ended: step t holds codebooks t - F + 1 .. min(t, C - 1).
        left = position - self._start(num_frames)
        for step in range(num_frames, num_frames + count - 1):
            first = step - num_frames + 1
            width = min(step, count - 1) - first + 1
            if left < width:
                return self._ids_of(first + left), False
            left -= width
        return range(0), True

    def _start(self, step: int) -> int:
        """Positions before ``step`` while the audio goes on."""
        growing = min(step, self.num_codebooks)
        return growing * (growing + 1) // 2 + (step - growing) * self.num_codebooks

    def _order(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        codebook, frame = super()._order(num_frames)
        order = np.lexsort((codebook, codebook + frame))
        return codebook[order], frame[order]


def _require_codebooks(layout: str, num_codebooks: int) -> None:
    if num_codebooks < 2:
        raise ConfigError(f"vocab.layout={layout!r}: needs at least 2 codebooks, vocab.num_codebooks={num_codebooks}")


CODEC_LAYOUTS: dict[str, type[CodecLayout]] = {
    "frame": FrameLayout,
    "frame_delay": FrameDelayLayout,
    "flat": FlatLayout,
    "flat_delay": FlatDelayLayout,
}

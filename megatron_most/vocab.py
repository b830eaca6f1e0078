"""Ids, codes and modalities: the one source of truth for what an id means.

Shape letters: C codebooks, F codec frames, n positions an audio segment takes, s positions of a document. Codes are
``[F, C]``, frame after frame.

The id space is ``[text ids of the base tokenizer | begin_of_audio | end_of_audio | frame | ids of the codec layout]``.
Ids from ``begin_of_audio`` on are audio; everything below is text, so a base model keeps its ids.
"""

from __future__ import annotations

import dataclasses
from enum import IntEnum
from typing import Any

import numpy as np

from megatron_most.codec_layouts import CODEC_LAYOUTS, CodecLayout
from megatron_most.codec_layouts import NO_CODE as NO_CODE
from megatron_most.errors import ConfigError, DataError
from megatron_most.keys import REQUIRED, key


class Modality(IntEnum):
    """What a position holds; the value indexes expert groups and per-modality metrics. Others may follow these two."""

    TEXT = 0
    AUDIO = 1


_RESERVED_NAMES = ("common", "rest")
"""Names of pools and parts of the model, which no modality may have."""

_NUM_SPECIAL = 3  # begin_of_audio, end_of_audio, frame


def check_codes(codes: np.ndarray, num_codebooks: int, codebook_size: int, where: str) -> None:
    """Raise :class:`DataError` unless ``codes`` is ``[F, C]`` with every value inside its codebook."""
    if codes.ndim != 2 or codes.shape[1] != num_codebooks:
        raise DataError(f"{where}: codes have shape {list(codes.shape)}, expected [frames, {num_codebooks}]")
    wrong = np.argwhere((codes < 0) | (codes >= codebook_size))
    if wrong.size:
        frame, codebook = wrong[0]
        raise DataError(
            f"{where}: code {codes[frame, codebook]} of codebook {codebook}, frame {frame}"
            f" is outside 0..{codebook_size - 1}"
        )


@dataclasses.dataclass
class ModalityRange:
    """A further modality: a range of text ids, such as image tokens."""

    name: str = key(REQUIRED, "name of the modality")
    start: int = key(REQUIRED, "its first id")
    stop: int = key(REQUIRED, "the id after its last")


@dataclasses.dataclass
class VocabLayout:
    """The id space of a model and its data; stored with every dataset and checkpoint."""

    text_vocab_size: int = key(REQUIRED, "number of text ids, which start at 0", most=1 << 24)
    num_codebooks: int = key(REQUIRED, "codebooks of the model: the first ones of a codec that has more", most=1024)
    codebook_size: int = key(REQUIRED, "codes in a codebook, the same for all codebooks", most=1 << 24)
    layout: str = key(
        "frame", "one position per codec frame (`frame`, `frame_delay`) or per code (`flat`, `flat_delay`)"
    )
    further_modalities: list[ModalityRange] = key(list, "ranges of text ids that are modalities of their own")

    def __post_init__(self) -> None:
        self.further_modalities = [
            entry if isinstance(entry, ModalityRange) else ModalityRange(**entry) for entry in self.further_modalities
        ]
        for field in ("text_vocab_size", "num_codebooks", "codebook_size"):
            if getattr(self, field) < 1:
                raise ConfigError(f"vocab.{field}={getattr(self, field)}: must be at least 1")
        if self.layout not in CODEC_LAYOUTS:
            raise ConfigError(f"vocab.layout={self.layout!r}: must be one of {', '.join(CODEC_LAYOUTS)}")
        CODEC_LAYOUTS[self.layout](
            0, self.num_codebooks, self.codebook_size
        )  # raises for codebooks that do not fit the layout
        end = 0
        for entry in sorted(self.further_modalities, key=lambda entry: entry.start):
            where = f"vocab.further_modalities[{entry.name}]={entry.start}..{entry.stop}"
            if not entry.name.isidentifier() or entry.name in _RESERVED_NAMES:
                raise ConfigError(
                    f"vocab.further_modalities: name {entry.name!r} must be a word other than"
                    f" {', '.join(_RESERVED_NAMES)}"
                )
            if not 0 <= entry.start < entry.stop <= self.text_vocab_size:
                raise ConfigError(f"{where}: must be a range of the {self.text_vocab_size} text ids")
            if entry.start < end:
                raise ConfigError(f"{where}: overlaps another modality's range")
            end = entry.stop
        if len(set(self.modality_names)) < len(self.modality_names):
            raise ConfigError(f"vocab.further_modalities: names must differ, got {', '.join(self.modality_names)}")

    @property
    def begin_of_audio(self) -> int:
        return self.text_vocab_size

    @property
    def end_of_audio(self) -> int:
        return self.text_vocab_size + 1

    @property
    def frame(self) -> int:
        """``frame`` layout: a codec frame. ``flat`` layout: a code hidden from the input by frame dropout."""
        return self.text_vocab_size + 2

    @property
    def codec_layout(self) -> CodecLayout:
        return CODEC_LAYOUTS[self.layout](self.frame, self.num_codebooks, self.codebook_size)

    @property
    def size(self) -> int:
        """Number of ids, without padding."""
        return self.text_vocab_size + _NUM_SPECIAL + self.codec_layout.num_ids

    @property
    def modality_names(self) -> tuple[str, ...]:
        """Name of each modality, in the order of their indices."""
        return ("text", "audio", *(entry.name for entry in self.further_modalities))

    def modality_of(self, ids):
        """Modality index of each id, int64. Works on NumPy arrays and torch tensors alike."""
        modality = self.is_audio(ids) * Modality.AUDIO.value
        for index, entry in enumerate(self.further_modalities, start=len(Modality)):
            modality = modality + ((ids >= entry.start) & (ids < entry.stop)) * index
        return modality

    def is_audio(self, ids):
        """Boolean array or tensor, True where the id is audio. Works on NumPy arrays and torch tensors alike."""
        return ids >= self.text_vocab_size

    def audio_segments(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Start and stop of each run of codec positions in ``ids [n]``, without the ids that begin and end audio."""
        is_codec = np.concatenate(([False], ids >= self.frame, [False]))
        edges = np.flatnonzero(is_codec[1:] != is_codec[:-1]).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))

    def check_codes(self, codes: np.ndarray, where: str) -> None:
        """:func:`check_codes` with this layout's codebooks."""
        check_codes(codes, self.num_codebooks, self.codebook_size, where)

    def check_ids(self, ids: np.ndarray, where: str) -> None:
        """Raise :class:`DataError` when an id lies outside the layout; ``where`` names dataset and document."""
        wrong = np.flatnonzero((ids < 0) | (ids >= self.size))
        if wrong.size:
            raise DataError(
                f"{where}, offset {wrong[0]}: id {ids[wrong[0]]} is outside the layout (0..{self.size - 1})"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def describe_difference(self, other: VocabLayout) -> str | None:
        """None when equal, else ``field: mine != theirs`` for each field that differs."""
        mine, theirs = self._readable(), other._readable()
        parts = [f"{field}: {mine[field]} != {theirs[field]}" for field in mine if mine[field] != theirs[field]]
        return ", ".join(parts) or None

    def _readable(self) -> dict[str, Any]:
        ranges = ", ".join(f"{entry.name} {entry.start}..{entry.stop}" for entry in self.further_modalities)
        return {**self.to_dict(), "further_modalities": ranges or "none"}

"""Tokenised audio on disk: one array of codes per utterance, its text beside it, and the codec that made it.

A set ``<prefix>`` is ``<prefix>.codes.{bin,idx}`` (a Megatron ``IndexedDataset``; F * C codes an utterance, frame
after frame), ``<prefix>.jsonl`` (``id``, ``text``, ``num_frames`` a line, in the same order) and ``<prefix>.json``,
written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_most.audio import AudioCodec
from megatron_most.data.indexed import ArrayReader, read_json
from megatron_most.errors import DataError


@dataclass(frozen=True)
class CodecIdentity:
    """Which codec made some codes; stored with them and with every dataset built from them."""

    name: str
    fingerprint: str
    num_codebooks: int
    codebook_size: int
    sample_rate: int
    frame_rate: float

    @classmethod
    def of(cls, codec: AudioCodec) -> CodecIdentity:
        return cls(
            codec.name, codec.fingerprint, codec.num_codebooks, codec.codebook_size, codec.sample_rate, codec.frame_rate
        )

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint[:12]})"


@dataclass(frozen=True)
class Utterance:
    """``codes [C, F]`` int64 of one line of the manifest."""

    id: str
    text: str
    codes: np.ndarray


class CodesDataset:
    """Reads what :func:`megatron_most.data.tokenise.tokenise` wrote.

    Attributes:
        codec: the codec that made the codes.

    Raises:
        DataError: files that are missing, unfinished or do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        sidecar = read_json(self.prefix + ".json", f"codes {self.prefix}")
        try:
            self.codec = CodecIdentity(**sidecar["codec"])
        except (KeyError, TypeError) as error:
            raise DataError(f"codes {self.prefix}: broken sidecar: {error}") from None
        self._codes = ArrayReader(self.prefix + ".codes")

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def seconds(self) -> float:
        """Seconds of audio, in whole codec frames."""
        return int(self._codes.lengths.sum(dtype=np.int64)) / self.codec.num_codebooks / self.codec.frame_rate

    def ids(self) -> Iterator[str]:
        """The id of each utterance, in their order."""
        return (utterance.id for utterance in self)

    def codes_of(self, index: int) -> np.ndarray:
        """``codes [C, F]`` int64 of utterance ``index``."""
        return self._codes[index].reshape(-1, self.codec.num_codebooks).T.astype(np.int64)

    def __iter__(self) -> Iterator[Utterance]:
        path = f"{self.prefix}.jsonl"
        index = 0
        try:
            with open(path, encoding="utf-8") as file:
                for index, line in enumerate(file):
                    entry = json.loads(line)
                    codes = self._codes[index].reshape(entry["num_frames"], self.codec.num_codebooks)
                    yield Utterance(entry["id"], entry["text"], codes.T.astype(np.int64))
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"codes {self.prefix}: {path}, line {index + 1} does not fit the codes: {error}") from None
        if index + 1 != len(self):
            raise DataError(f"codes {self.prefix}: {path} has {index + 1} lines for {len(self)} utterances")

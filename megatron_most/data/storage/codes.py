"""Tokenized audio on disk: the codes and text of each utterance, and the codec that made the codes.

Shape letters: C codebooks, F codec frames.

    <prefix>.codes.{bin,idx}   a Megatron ``IndexedDataset``: F * C codes per utterance, frame after frame
    <prefix>.jsonl             one line per utterance, in the same order: ``id``, ``text``, ``num_frames`` and more
    <prefix>.quarantine.jsonl  records that could not be used, and why
    <prefix>.json              the sidecar: codec and provenance; written last
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_most.audio import AudioCodec
from megatron_most.data.storage.indexed import ArrayReader
from megatron_most.data.storage.json_lines import parse_json_object, read_lines
from megatron_most.data.storage.sidecar import read_sidecar, with_current_keys
from megatron_most.errors import DataError
from megatron_most.files import parse_json


@dataclass(frozen=True)
class CodecIdentity:
    """The codec that made some codes; stored with the codes and with every dataset built from them."""

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
    """One record of audio, or one chunk of it.

    text: the transcript; empty if there is none. A chunk has none.
    codes: ``[F, C]`` int64.
    chunk: (k, n) for chunk k of n, counted from 0; None for a whole record.
    """

    id: str
    text: str
    codes: np.ndarray
    language: str | None = None
    speaker: str | None = None
    chunk: tuple[int, int] | None = None


class CodesDataset:
    """Reads what :func:`megatron_most.data.preparation.tokenize_audio.tokenize_audio` wrote.

    Attributes:
        codec: the codec that made the codes.
        provenance: ``source`` with its ``licenses``, ``counts``, ``limits``, ``device``, ``tool_version``, ``command``.

    Raises:
        DataError: a file is missing or unfinished, or the files disagree.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        sidecar = with_current_keys(read_sidecar(self.prefix + ".json", f"codes {self.prefix}"))
        try:
            self.codec = CodecIdentity(**sidecar["codec"])
            if not min(self.codec.num_codebooks, self.codec.codebook_size, self.codec.frame_rate) > 0:
                raise ValueError("the numbers of its codec must be above 0")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"codes {self.prefix}: broken sidecar: {error}") from None
        self.provenance = {name: value for name, value in sidecar.items() if name not in ("codec", "format")}
        self._codes = ArrayReader(self.prefix + ".codes")

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def seconds(self) -> float:
        """Duration of all utterances, in whole codec frames."""
        return int(self._codes.lengths.sum(dtype=np.int64)) / self.codec.num_codebooks / self.codec.frame_rate

    def ids(self) -> Iterator[str]:
        """The id of each utterance, in order."""
        return (entry["id"] for _, entry in self._lines())

    def set_aside(self) -> Iterator[str]:
        """Ids of records that are not utterances here: they are in quarantine or were cut into chunks."""
        quarantine = Path(f"{self.prefix}.quarantine.jsonl")
        for line in read_lines(quarantine) if quarantine.is_file() else ():
            if (identity := parse_json_object(line.text).get("id")) is not None:
                yield identity
        for _, entry in self._lines():
            if "chunk" in entry:
                yield entry["id"].rpartition("#")[0]

    def codes_of(self, index: int) -> np.ndarray:
        """``codes [F, C]`` int64 of utterance ``index``."""
        return self._codes[index].reshape(-1, self.codec.num_codebooks).astype(np.int64)

    def __iter__(self) -> Iterator[Utterance]:
        for index, entry in self._lines():
            chunk = entry.get("chunk")
            yield Utterance(
                entry["id"],
                entry["text"],
                self.codes_of(index),
                entry.get("language"),
                entry.get("speaker"),
                tuple(chunk) if chunk else None,
            )

    def _lines(self) -> Iterator[tuple[int, dict]]:
        """Index and entry of each utterance, checked against the codes."""
        path = f"{self.prefix}.jsonl"
        index = 0
        try:
            with open(path, encoding="utf-8") as file:
                for index, line in enumerate(file):
                    entry = parse_json(line)
                    if entry["num_frames"] * self.codec.num_codebooks != self._codes.lengths[index]:
                        raise ValueError(f"{self._codes.lengths[index]} codes for {entry['num_frames']} frames")
                    if not isinstance(entry["id"], str) or not isinstance(entry["text"], str):
                        raise ValueError("id and text must be texts")
                    yield index, entry
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"codes {self.prefix}: {path}, line {index + 1} does not fit the codes: {error}") from None
        if index + 1 != len(self):
            raise DataError(f"codes {self.prefix}: {path} has {index + 1} lines for {len(self)} utterances")

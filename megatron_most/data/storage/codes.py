"""Tokenized audio on disk: one array of codes per utterance, its text beside it, and the codec that made it.

Shape letters: C codebooks, F codec frames.

A set ``<prefix>`` is ``<prefix>.codes.{bin,idx}`` (a Megatron ``IndexedDataset``; F * C codes an utterance, frame
after frame), ``<prefix>.jsonl`` (``id``, ``text``, ``num_frames`` and more a line, in the same order),
``<prefix>.quarantine.jsonl`` (what could not be used, and why) and ``<prefix>.json``, written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_most.audio import AudioCodec
from megatron_most.data.storage.indexed import ArrayReader
from megatron_most.data.storage.json_lines import parse_json_object, read_lines
from megatron_most.data.storage.sidecar import read_sidecar, with_current_keys
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
    """``codes [F, C]`` int64 of one record, or of a chunk of it.

    text: empty where there is none, as for chunks.
    chunk: (k, n): the k-th of n chunks, from 0; None for a whole record.
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
        provenance: what they were made from: ``source`` with its ``licenses``, ``counts``, ``limits``, ``device``,
            ``tool_version``, ``command``.

    Raises:
        DataError: files that are missing, unfinished or do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        sidecar = with_current_keys(read_sidecar(self.prefix + ".json", f"codes {self.prefix}"))
        try:
            self.codec = CodecIdentity(**sidecar["codec"])
        except (KeyError, TypeError) as error:
            raise DataError(f"codes {self.prefix}: broken sidecar: {error}") from None
        self.provenance = {name: value for name, value in sidecar.items() if name not in ("codec", "format")}
        self._codes = ArrayReader(self.prefix + ".codes")

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def seconds(self) -> float:
        """Seconds of audio, in whole codec frames."""
        return int(self._codes.lengths.sum(dtype=np.int64)) / self.codec.num_codebooks / self.codec.frame_rate

    def ids(self) -> Iterator[str]:
        """The id of each utterance, in their order."""
        return (entry["id"] for _, entry in self._lines())

    def set_aside(self) -> Iterator[str]:
        """Ids of records that no utterance here has: those in quarantine, and those that became chunks."""
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
        """Place and entry of each line of the JSON-lines file, checked against the codes."""
        path = f"{self.prefix}.jsonl"
        index = 0
        try:
            with open(path, encoding="utf-8") as file:
                for index, line in enumerate(file):
                    entry = json.loads(line)
                    if entry["num_frames"] * self.codec.num_codebooks != self._codes.lengths[index]:
                        raise ValueError(f"{self._codes.lengths[index]} codes for {entry['num_frames']} frames")
                    yield index, entry | {"id": entry["id"], "text": entry["text"]}  # KeyError where one is missing
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"codes {self.prefix}: {path}, line {index + 1} does not fit the codes: {error}") from None
        if index + 1 != len(self):
            raise DataError(f"codes {self.prefix}: {path} has {index + 1} lines for {len(self)} utterances")

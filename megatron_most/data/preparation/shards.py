"""A tokenization job and its shards: consecutive records whose codes are committed together.

Committed, a shard ``<prefix>`` is ``<prefix>.codes`` (the arrays, one after the other), ``<prefix>.rejected.jsonl`` and
``<prefix>.jsonl``, written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_most.data.preparation.collect import Collected, SourceSpec
from megatron_most.data.preparation.manifest import Record, parse_record
from megatron_most.data.storage.codes import CodecIdentity
from megatron_most.data.storage.json_lines import parse_json_object
from megatron_most.errors import DataError


@dataclass(frozen=True)
class Limits:
    """How long audio is handled.

    max_seconds: longest utterance.
    chunk_transcribed: whether longer audio with text is cut into chunks without text; otherwise it is rejected. Audio
        without text is always cut into chunks.
    """

    max_seconds: float = 60.0
    chunk_transcribed: bool = False


@dataclass(frozen=True)
class Execution:
    """How a job is run. Only the device can change what comes out.

    workers: processes; None takes one per CPU core this process may use.
    task: (i, n): every n-th shard from the i-th on, beside other tasks that encode the others.
    device: ``cpu``, ``cuda``, or ``auto``: CUDA where there is one.
    hash_audio: tell edited audio files by their content; otherwise by their size and the time of their last change.
    """

    workers: int | None = None
    task: tuple[int, int] = (0, 1)
    device: str = "auto"
    hash_audio: bool = False


@dataclass(frozen=True)
class Job:
    """Everything that determines the output."""

    source: SourceSpec
    collected: Collected
    codec: CodecIdentity
    limits: Limits
    device: str

    def to_dict(self) -> dict:
        return {
            "source": self.source.to_dict() | self.collected.origin(),
            "records_sha256": self.collected.sha256,
            "audio_sha256": self.collected.audio_sha256,
            "audio_identity": self.collected.audio_identity,
            "codec": self.codec.to_dict(),
            "limits": asdict(self.limits),
            "device": self.device,
        }


@dataclass(frozen=True)
class Shard:
    """Lines ``start`` to ``end`` (bytes) of a collected manifest."""

    prefix: Path
    manifest: Path
    start: int
    end: int
    num_records: int

    @property
    def is_done(self) -> bool:
        return Path(f"{self.prefix}.jsonl").is_file()

    def records(self) -> Iterator[Record]:
        with open(self.manifest, "rb") as file:
            file.seek(self.start)
            lines = file.read(self.end - self.start).splitlines()
        for line in lines:
            entry = parse_json_object(line.decode("utf-8"))
            record = parse_record(entry, self.manifest, 0, needs_text=False)
            yield replace(record, where=entry["where"])

    def utterances(self, num_codebooks: int, dtype: type[np.integer]) -> Iterator[tuple[str, np.ndarray]]:
        """What was committed: each utterance's line, and its codes, frame after frame."""
        codes = np.fromfile(f"{self.prefix}.codes", dtype=dtype)
        at = 0
        for line in Path(f"{self.prefix}.jsonl").read_bytes().splitlines(keepends=True):
            size = json.loads(line)["num_frames"] * num_codebooks
            yield line.decode("utf-8"), codes[at : at + size]
            at += size
        if at != codes.size:
            raise DataError(f"{self.prefix}.codes: holds {codes.size} codes, its lines tell of {at}; remove the shard")

    def rejected(self) -> list[str]:
        return Path(f"{self.prefix}.rejected.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)

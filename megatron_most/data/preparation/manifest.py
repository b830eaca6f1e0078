"""The one record of the data pipeline, and the JSON-lines manifests that hold it.

A manifest is NeMo's (``audio_filepath``, ``duration``, ``text``, ``offset``) with further optional fields.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_most.audio import read_audio
from megatron_most.audio.io import DURATION_TOLERANCE
from megatron_most.data.storage.json_lines import Line, license_of, parse_json_object, read_lines, seconds_of, text_of
from megatron_most.errors import DataError, shown


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; ``role`` as the data has it (``system``, ``user``, ``assistant``, ...)."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """One utterance; one text when ``audio`` is None; one conversation when there are ``turns``.

    id: unique in its source.
    text: transcript or text; empty if there is none.
    audio: a file; with ``part``, the file that holds it.
    offset: seconds into the audio where the utterance starts; None takes all of it.
    duration: seconds, as the source says; None when it does not.
    part: first byte and number of bytes of the audio within the file ``audio`` (a member of a tar); None: the file.
    channel: the channel to use; None averages all.
    where: file and line, or archive and member, of the record; messages name it.
    """

    id: str
    text: str
    audio: Path | None
    offset: float | None
    duration: float | None
    part: tuple[int, int] | None = None
    channel: int | None = None
    language: str | None = None
    speaker: str | None = None
    license: str | None = None
    split: str | None = None
    turns: tuple[Turn, ...] = ()
    where: str = ""

    def to_entry(self) -> dict[str, Any]:
        """The record as a line of a manifest, without unknown fields."""
        entry: dict[str, Any] = {"id": self.id}
        if self.audio is not None:
            entry["audio_filepath"] = str(self.audio)
        for name in ("offset", "duration", "channel", "language", "speaker", "license", "split"):
            if (value := getattr(self, name)) is not None:
                entry[name] = value
        if self.part is not None:
            entry["part"] = list(self.part)
        if self.text:
            entry["text"] = self.text
        if self.turns:
            entry["messages"] = [{"role": turn.role, "content": turn.text} for turn in self.turns]
        return entry


@dataclass(frozen=True)
class Rejection:
    """An entry of a source that cannot be used: ``where`` (file and line, or file) and why."""

    where: str
    reason: str
    id: str | None = None

    def to_entry(self) -> dict[str, Any]:
        return {"where": self.where, "reason": self.reason} | ({} if self.id is None else {"id": self.id})


def iterate_manifest(
    path: Path, lines: Iterable[Line], *, needs_audio: bool = True, needs_text: bool = True
) -> Iterator[Record | Rejection]:
    """Each line of a manifest as a record or a rejection. Relative audio paths start at the manifest's folder."""
    for line in lines:
        where = f"{path}, line {line.number}"
        if line.problem:
            yield Rejection(where, line.problem)
        elif line.text.strip():
            try:
                entry = parse_json_object(line.text)
                yield parse_record(entry, path, line.number, needs_audio=needs_audio, needs_text=needs_text)
            except DataError as error:
                yield Rejection(where, str(error))


def read_manifest(path: str | Path, *, needs_audio: bool = True) -> list[Record]:
    """All of :func:`manifest_records`."""
    return list(manifest_records(path, needs_audio=needs_audio))


def manifest_records(path: str | Path, *, needs_audio: bool = True) -> Iterator[Record]:
    """The records of a manifest, one at a time; every line must be valid.

    Raises:
        DataError: the manifest is unreadable or empty, or a line (named by its number) is not a JSON object, lacks a
            field, has a field of the wrong type, or repeats an id.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such manifest")
    seen: dict[bytes, int] = {}  # ids of millions of records are long
    for record in iterate_manifest(path, read_lines(path), needs_audio=needs_audio):
        if isinstance(record, Rejection):
            raise DataError(f"{record.where}: {record.reason}")
        digest = id_digest(record.id)
        if digest in seen:
            raise DataError(f"{record.where}: id {shown(record.id)} is already that of line {seen[digest]}")
        seen[digest] = int(record.where.rsplit(" ", 1)[1])
        yield record
    if not seen:
        raise DataError(f"{path}: empty manifest")


def id_digest(identity: str) -> bytes:
    """Twelve bytes that stand for an id."""
    return hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def open_audio(record: Record) -> Path | BinaryIO:
    """The record's file, or the bytes of a tar's member, for :func:`~megatron_most.audio.read_audio`."""
    assert record.audio is not None, f"{record.id} is a text without audio"
    if record.part is None:
        return record.audio
    start, size = record.part
    try:
        with open(record.audio, "rb") as file:
            missing = start + size - file.seek(0, os.SEEK_END)
            if missing > 0:
                raise DataError(f"{record.audio}: cut off: {missing} bytes of a member are missing")
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise DataError(f"{record.audio}: not readable: {error.strerror}") from None
    return io.BytesIO(content)


def read_waveform(record: Record, sample_rate: int) -> np.ndarray:
    """The record's audio, float32 ``[T]``: a segment of the file where the manifest has an offset, else all of it.

    Raises:
        DataError: as :func:`~megatron_most.audio.read_audio`, or the file is not as long as the manifest says.
    """
    audio = open_audio(record)
    if record.offset is not None:
        return read_audio(audio, sample_rate, offset=record.offset, duration=record.duration, channel=record.channel)
    waveform = read_audio(audio, sample_rate, channel=record.channel)
    check_duration(record, len(waveform) / sample_rate)
    return waveform


def check_duration(record: Record, seconds: float) -> None:
    """Raise if the audio is not as long as the manifest says: its text may belong to other audio."""
    if record.duration is not None and abs(seconds - record.duration) > DURATION_TOLERANCE:
        raise DataError(f"{record.audio}: holds {seconds:.2f} s, the manifest says {record.duration:.2f} s")


def parse_turns(messages: Any) -> tuple[Turn, ...]:
    """``messages`` of chat data: a list of objects with ``role`` and ``content``; empty without messages."""
    if messages is None:
        return ()
    if not isinstance(messages, list) or not messages:
        raise DataError("messages: must be a list that is not empty")
    turns = []
    for index, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not role or not isinstance(content, str):
            raise DataError(f"messages[{index}]: must have a role and a content, both texts")
        turns.append(Turn(role, content.strip()))
    return tuple(turns)


def parse_record(
    entry: dict[str, Any], path: Path, number: int, *, needs_audio: bool = True, needs_text: bool = True
) -> Record:
    """Line ``number`` of the manifest ``path`` as a record.

    Raises:
        DataError: a field that is missing or of the wrong type.
    """
    turns = parse_turns(entry.get("messages"))
    text = entry.get("text")
    if text is None and (turns or not needs_text):
        text = ""
    if not isinstance(text, str) or (needs_text and not turns and not text.strip()):
        raise DataError(f"text={shown(text)}: must be a text that is not empty")
    audio = entry.get("audio_filepath")
    if audio is None and needs_audio:
        raise DataError("audio_filepath is missing")
    if audio is not None and (not isinstance(audio, str) or not audio or "\0" in audio):
        raise DataError(f"audio_filepath={shown(audio)}: must be a path")
    if audio is not None and "://" in audio:
        raise DataError(f"audio_filepath={shown(audio)}: an address is not read; download the file")
    duration = seconds_of(entry, "duration")
    if duration == 0:
        raise DataError("duration=0: must be greater than 0")
    return Record(
        id=text_of(entry, "id") or f"{path.stem}:{number}",
        text=text.strip(),
        audio=None if audio is None else path.parent / audio,
        offset=seconds_of(entry, "offset"),
        duration=duration,
        part=_part(entry.get("part")),
        channel=_channel(entry.get("channel")),
        language=text_of(entry, "language") or text_of(entry, "lang"),
        speaker=text_of(entry, "speaker"),
        license=license_of(entry),
        split=text_of(entry, "split"),
        turns=turns,
        where=f"{path}, line {number}",
    )


def _part(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(item) is int and item >= 0 for item in value):
        raise DataError(f"part={shown(value)}: must be a first byte and a number of bytes")
    return value[0], value[1]


def _channel(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise DataError(f"channel={shown(value)}: must be a number of a channel, from 0")
    return value

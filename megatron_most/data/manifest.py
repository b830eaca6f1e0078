"""NeMo manifests: one JSON object a line, with ``audio_filepath``, ``duration``, ``text`` and optionally more."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_most.audio import read_audio
from megatron_most.audio.io import DURATION_TOLERANCE
from megatron_most.errors import DataError


@dataclass(frozen=True)
class Record:
    """One utterance, or one text when ``audio`` is None.

    id: the manifest's ``id``, or ``<manifest>:<line>``.
    offset: seconds into the file where the utterance starts; None takes the whole file.
    duration: seconds, as the manifest says; None when it does not.
    """

    id: str
    text: str
    audio: Path | None
    offset: float | None
    duration: float | None


def read_manifest(path: str | Path, *, needs_audio: bool = True) -> list[Record]:
    """Read a manifest; relative audio paths are relative to its folder.

    Raises:
        DataError: unreadable or empty manifest; a line (named by its number) that is no JSON object, lacks a field,
            holds a field of the wrong type, or repeats an id.
    """
    path = Path(path)
    try:
        # Not splitlines(): JSON text may hold separators such as U+2028 as they are. read_text makes "\r\n" a "\n".
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such manifest") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable: {error}") from None
    records: list[Record] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line, path, number, needs_audio)
        if record.id in seen:
            raise DataError(f"{path}, line {number}: id {record.id!r} is already that of line {seen[record.id]}")
        seen[record.id] = number
        records.append(record)
    if not records:
        raise DataError(f"{path}: empty manifest")
    return records


def read_waveform(record: Record, sample_rate: int) -> np.ndarray:
    """The record's audio, float32 ``[T]``: a segment of the file where the manifest has an offset, else all of it.

    Raises:
        DataError: as :func:`~megatron_most.audio.read_audio`, or the file is shorter than the manifest says.
    """
    assert record.audio is not None, f"{record.id} is a text without audio"
    if record.offset is not None:
        return read_audio(record.audio, sample_rate, offset=record.offset, duration=record.duration)
    waveform = read_audio(record.audio, sample_rate)
    seconds = len(waveform) / sample_rate
    if record.duration is not None and seconds < record.duration - DURATION_TOLERANCE:
        raise DataError(f"{record.audio}: holds {seconds:.2f} s, the manifest says {record.duration:.2f} s")
    return waveform


def _parse(line: str, path: Path, number: int, needs_audio: bool) -> Record:
    where = f"{path}, line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be a JSON object")
    text = entry.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: text={text!r}: must be a text that is not empty")
    audio = entry.get("audio_filepath")
    if audio is None and needs_audio:
        raise DataError(f"{where}: audio_filepath is missing")
    if audio is not None and (not isinstance(audio, str) or not audio):
        raise DataError(f"{where}: audio_filepath={audio!r}: must be a path")
    duration = _seconds(entry, "duration", where)
    if duration == 0:
        raise DataError(f"{where}: duration=0: must be greater than 0")
    return Record(
        id=str(entry.get("id", f"{path.stem}:{number}")),
        text=text.strip(),
        audio=None if audio is None else path.parent / audio,
        offset=_seconds(entry, "offset", where),
        duration=duration,
    )


def _seconds(entry: dict, field: str, where: str) -> float | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise DataError(f"{where}: {field}={value!r}: must be a number of seconds")
    return float(value)

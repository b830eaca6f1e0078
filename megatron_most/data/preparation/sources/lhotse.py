"""Lhotse cut sets (JSON lines of ``MonoCut``), and LibriHeavy, which is published as one.

Cuts are read here and not by Lhotse: a cut set may name commands to run and addresses to fetch, and Lhotse obeys.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_most.audio.io import DURATION_TOLERANCE
from megatron_most.data.preparation.manifest import Record, Rejection
from megatron_most.data.preparation.sources.base import Source
from megatron_most.data.storage.json_lines import MAX_SECONDS, parse_json_object, seconds_of, text_of
from megatron_most.errors import ConfigError, DataError

_LANGUAGES = {"english": "en"}


class LhotseCuts(Source):
    name = "lhotse"
    layout = "cuts*.jsonl or cuts*.jsonl.gz (or one such file); audio paths are relative to its folder"
    patterns: tuple[str, ...] = ("*cuts*.jsonl", "*cuts*.jsonl.gz")

    def records(self) -> Iterator[Record | Rejection]:
        for path in self.files(*self.patterns):
            for line in self.lines(path):
                where = f"{path}, line {line.number}"
                if line.problem:
                    yield Rejection(where, line.problem)
                elif line.text.strip():
                    try:
                        yield self._record(parse_json_object(line.text), where, self._split_of(path))
                    except DataError as error:
                        yield Rejection(where, str(error))

    def _split_of(self, path: Path) -> str:
        """``train`` for ``cuts_train.jsonl.gz`` and ``librispeech_cuts_train.jsonl.gz``."""
        stem = super()._split_of(path)
        return stem.rpartition("cuts")[2].strip("_-") or stem

    def _record(self, cut: dict[str, Any], where: str, split: str) -> Record:
        if cut.get("type", "MonoCut") != "MonoCut":
            raise DataError(f"type={cut['type']!r}: only MonoCut is read")
        source, supervision = _source_of(_object(cut, "recording")), _supervision_of(cut)
        text = (self._text(supervision) or "").strip()
        offset, duration = _segment_of(cut, supervision if text else {})
        language = text_of(supervision, "language")
        return Record(
            id=text_of(cut, "id") or where,
            text=text,
            audio=Path(source["source"]),
            offset=offset,
            duration=duration,
            channel=_place_of_channel(cut, supervision, source),
            language=_LANGUAGES.get((language or "").lower(), language),
            speaker=text_of(supervision, "speaker"),
            split=split,
            where=where,
        )

    def _text(self, supervision: dict[str, Any]) -> str | None:
        return text_of(supervision, self.options.text_field or "text")


class LibriHeavy(LhotseCuts):
    """Each cut carries its text twice: as printed, with case and punctuation, and in plain capitals."""

    name = "libriheavy"
    layout = "libriheavy_cuts_SIZE.jsonl.gz, download/librilight/...; text-field printed (default) or plain"
    license = "public domain"
    patterns = ("libriheavy_cuts_*.jsonl.gz",)

    def _text(self, supervision: dict[str, Any]) -> str | None:
        field = self.options.text_field or "printed"
        if field not in ("printed", "plain"):
            raise ConfigError(f"text field {field}: must be printed or plain")
        texts = _object(supervision, "custom").get("texts")
        if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise DataError("supervisions[0].custom.texts: must be two texts")
        return texts[("printed", "plain").index(field)]


def _source_of(recording: dict[str, Any]) -> dict[str, Any]:
    """The one file of a recording: an object with ``source`` (its path) and ``channels``."""
    sources = recording.get("sources")
    source = sources[0] if isinstance(sources, list) and len(sources) == 1 else None
    if not isinstance(source, dict) or source.get("type") != "file" or not isinstance(source.get("source"), str):
        raise DataError("recording.sources: must be one source of type 'file'")
    if "://" in source["source"]:
        raise DataError(f"recording.sources: {source['source']}: an address is not read; download the file")
    if recording.get("transforms"):
        raise DataError("recording.transforms: must be empty; save the transformed audio")
    return source


def _supervision_of(cut: dict[str, Any]) -> dict[str, Any]:
    """The one supervision of a cut; empty where it has none."""
    supervisions = cut.get("supervisions") or []
    if not isinstance(supervisions, list) or len(supervisions) > 1:
        raise DataError("supervisions: must be at most one (trim the cuts to supervisions)")
    supervision = supervisions[0] if supervisions else {}
    if not isinstance(supervision, dict):
        raise DataError("supervisions: must hold objects")
    return supervision


def _segment_of(cut: dict[str, Any], supervision: dict[str, Any]) -> tuple[float, float]:
    """Start and length in seconds, within the recording, of the audio that the supervision's text belongs to.

    That is the supervision, whose start is counted from the cut's; the cut where there is none, or hardly a difference.
    """
    start, duration = seconds_of(cut, "start"), seconds_of(cut, "duration")
    if start is None or not duration:
        raise DataError("start and duration: must be numbers of seconds, the latter above 0")
    length, first = seconds_of(supervision, "duration"), supervision.get("start", 0.0)
    if length is None:
        return start, duration
    if isinstance(first, bool) or not isinstance(first, (int, float)) or not abs(first) <= MAX_SECONDS or not length:
        raise DataError("supervisions[0].start and .duration: must be numbers of seconds, the latter above 0")
    last = first + length
    if min(first, duration - last) < -DURATION_TOLERANCE:
        raise DataError(f"supervisions[0]: its text is of {first:.2f}..{last:.2f} s, the cut holds 0..{duration:.2f} s")
    if max(first, duration - last) <= DURATION_TOLERANCE:
        return start, duration
    first, last = max(first, 0.0), min(last, duration)
    return start + first, last - first


def _place_of_channel(cut: dict[str, Any], supervision: dict[str, Any], source: dict[str, Any]) -> int | None:
    """Which of its file's channels a cut is of, counted from 0; None where there is only one.

    Lhotse numbers the channels of a recording, and the file holds them in the order of ``channels``: of a source with
    the channels 1 and 3, channel 3 is the second one in the file.
    """
    channels, channel = source.get("channels") or [0], cut.get("channel", 0)
    if not isinstance(channels, list) or channel not in channels:
        raise DataError(f"channel={channel!r}: the recording has {channels}")
    if supervision.get("channel", channel) not in (channel, [channel]):
        raise DataError(f"supervisions[0].channel={supervision['channel']!r}: the cut is of channel {channel}")
    return channels.index(channel) if len(channels) > 1 else None


def _object(parent: dict[str, Any], name: str) -> dict[str, Any]:
    value = parent.get(name)
    if not isinstance(value, dict):
        raise DataError(f"{name}: is missing")
    return value

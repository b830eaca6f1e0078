"""Tar shards: WebDataset (audio and JSON or text members of one name) and NeMo's tarred manifests.

An archive is read once, from its beginning to its end, skipping the audio. Records keep the place of their member and
come in the order of the archive, so that decoding reads it from beginning to end too.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from megatron_most.data.preparation.manifest import Record, Rejection, parse_record
from megatron_most.data.preparation.sources.base import Source
from megatron_most.data.storage.json_lines import license_of, parse_json_object, seconds_of, text_of
from megatron_most.errors import DataError

_AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_TEXT = (".json", ".txt")
_MAX_TEXT_BYTES = 16 << 20
_SHARD_NUMBER = re.compile(r"(\d+)\.tar$")
_TAR_NUMBER = re.compile(r"[-_]?\d+$")
_SEGMENT = re.compile(r"-sub\d+(?=\.\w+$)")
"""NeMo tells several segments of one member apart by such endings in the manifest. A member may be called so, too."""


@dataclass
class _Sample:
    """The members of one name."""

    audio: list[tarfile.TarInfo] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)


class WebDataset(Source):
    """Members are one sample as long as their names agree up to the first dot after the last slash."""

    name = "webdataset"
    layout = "*.tar with NAME.flac (wav, ogg, opus, mp3) and NAME.json (text, duration ...) or NAME.txt"

    def _split_of(self, path: Path) -> str:
        """Its folder's name, or its own without the number: ``train`` for ``train/0.tar`` and ``train-000000.tar``."""
        return path.parent.name if path.parent != self.folder else _TAR_NUMBER.sub("", path.stem) or path.stem

    def records(self) -> Iterator[Record | Rejection]:
        for path in self.files("*.tar", "*/*.tar"):
            key, sample = None, _Sample()
            for member, content in _members(path, self.real(path), _TEXT):
                name = PurePosixPath(member.name)
                of_member = str(name.parent / name.name.partition(".")[0])
                if of_member != key:
                    if key is not None:
                        yield self._record(path, key, sample)
                    key, sample = of_member, _Sample()
                if name.suffix in _AUDIO:
                    sample.audio.append(member)
                elif content is not None:
                    sample.texts[name.suffix] = content
            if key is not None:
                yield self._record(path, key, sample)

    def _record(self, path: Path, key: str, sample: _Sample) -> Record | Rejection:
        where, identity = f"{path}, {key}", f"{path.stem}/{key}"
        try:
            if len(sample.audio) != 1:
                raise DataError(f"has {len(sample.audio)} audio members, not one ({', '.join(_AUDIO)})")
            texts = {ending: content.decode("utf-8") for ending, content in sample.texts.items()}
            entry = parse_json_object(texts[".json"]) if ".json" in texts else {}
            text = text_of(entry, self.options.text_field or "text") or texts.get(".txt", "")
            return Record(
                id=identity,
                text=text.strip(),
                audio=path,
                offset=None,
                duration=seconds_of(entry, "duration"),
                part=(sample.audio[0].offset_data, sample.audio[0].size),
                language=text_of(entry, "language") or text_of(entry, "lang"),
                speaker=text_of(entry, "speaker"),
                license=license_of(entry),
                split=self._split_of(path),
                where=where,
            )
        except UnicodeDecodeError:
            return Rejection(where, "its text is not UTF-8", identity)
        except DataError as error:
            return Rejection(where, str(error), identity)


class NemoTarred(Source):
    """A manifest whose lines name a shard and a member of it; members that no line names are left out."""

    name = "nemo_tarred"
    layout = "tarred_audio_manifest.json (or manifest_N.json) with shard_id, and audio_N.tar"

    def records(self) -> Iterator[Record | Rejection]:
        wanted: dict[tuple[int, str], list[Record]] = {}
        manifests = ("tarred_audio_manifest.json", "manifest_*.json", "sharded_manifests/manifest_*.json")
        for manifest in self.files(*manifests):
            for line in self.lines(manifest):
                where = f"{manifest}, line {line.number}"
                try:
                    if line.problem:
                        raise DataError(line.problem)
                    if line.text.strip():
                        entry = parse_json_object(line.text)
                        record = parse_record(entry, manifest, line.number, needs_text=self.options.needs_text)
                        wanted.setdefault((_shard(entry), entry["audio_filepath"]), []).append(record)
                except DataError as error:
                    yield Rejection(where, str(error))
        for path in sorted(self.folder.rglob("*.tar")):
            number = _SHARD_NUMBER.search(path.name)
            yield from self._shard(path, int(number[1]), wanted) if number else ()
        for (shard, member), records in wanted.items():
            for record in records:
                yield Rejection(record.where, f"{member}: is not in shard {shard}", record.id)

    def _shard(
        self, path: Path, shard: int, wanted: dict[tuple[int, str], list[Record]]
    ) -> Iterator[Record | Rejection]:
        members = [(member.name.removeprefix("./"), member) for member, _ in _members(path, self.real(path))]
        held = {name for name, _ in members}
        names: dict[str, list[str]] = {}
        for number, name in wanted:
            if number == shard:
                names.setdefault(name if name in held else _SEGMENT.sub("", name), []).append(name)
        for member_name, member in members:
            for name in names.pop(member_name, []):
                for record in wanted.pop((shard, name)):
                    yield replace(record, audio=path, part=(member.offset_data, member.size))


def _shard(entry: dict) -> int:
    shard = entry.get("shard_id")
    if type(shard) is not int:
        raise DataError(f"shard_id={shard!r}: must be the number of a shard")
    return shard


def _members(path: Path, real: Path, read: tuple[str, ...] = ()) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The regular files of an archive in its order, with the content of those whose name ends as in ``read``.

    Links are left out: nothing outside the archive is ever reached through it.
    """
    try:
        with tarfile.open(real, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.issparse():
                    continue
                content = None
                if member.name.endswith(read) and member.size <= _MAX_TEXT_BYTES:
                    text = archive.extractfile(member)
                    assert text is not None, "a regular file has content"
                    content = text.read()
                yield member, content
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not readable as an uncompressed tar: {error}") from None

"""A source -> a checked manifest: every record or its reason, each with the line it stands in."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_most.data.preparation.manifest import Record, Rejection, id_digest
from megatron_most.data.preparation.sources import Source, SourceOptions, open_source
from megatron_most.errors import DataError
from megatron_most.files import replacing

MAX_QUARANTINE = 0.01
"""Default limit on the share of unusable records; tokenization fails above it."""

SIZE_AND_TIME, CONTENT = "size and time", "content"
"""What tells an edited audio file (:attr:`Collected.audio_identity`)."""


@dataclass(frozen=True)
class SourceSpec:
    """Which source, and what of it.

    name: one of :data:`~megatron_most.data.preparation.sources.SOURCES`.
    root: its folder, or its file.
    audio_roots: further folders that its audio may lie in, beside the root's own.
    """

    name: str
    root: str
    audio_roots: tuple[str, ...] = ()
    options: SourceOptions = SourceOptions()

    def open(self) -> Source:
        return open_source(self.name, self.root, self.options, self.audio_roots)

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Collected:
    """What :func:`collect` wrote.

    num_records, num_rejected: lines of the two files.
    num_repeated: of the rejected, conversations that an earlier record holds, too.
    sha256: of both, equal for a source in an equal state. It reads ``licence`` for ``license`` as version 0.1 wrote it,
        so that jobs begun then go on.
    audio_sha256: of the size and modification time of each record's audio file, or of its content.
    audio_identity: :data:`SIZE_AND_TIME` or :data:`CONTENT`.
    licenses, splits: number of records of each; ``unknown`` if not stated.
    """

    num_records: int
    num_rejected: int
    num_repeated: int
    sha256: str
    audio_sha256: str
    licenses: dict[str, int]
    splits: dict[str, int]
    audio_identity: str = SIZE_AND_TIME

    def origin(self) -> dict[str, dict[str, int]]:
        """What a sidecar states about the records, beside their source."""
        return {"licenses": self.licenses, "splits": self.splits}


def collect(spec: SourceSpec, manifest: Path, quarantine: Path, *, hash_audio: bool = False) -> Collected:
    """Write the usable records of a source to ``manifest`` and the others to ``quarantine``, one JSON line each.

    Args:
        hash_audio: read all audio files, to tell them by their content.

    Raises:
        DataError: the source cannot be read or is empty; no file is written.
    """
    digest, audio_digest = hashlib.sha256(), hashlib.sha256()
    counts: Counter[type] = Counter()
    licenses: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    num_repeated = 0
    # Many cuts are of one recording, and many recordings in one tar.
    state = functools.lru_cache(maxsize=1024)(_content if hash_audio else _size_and_time)
    with replacing(quarantine) as left, replacing(manifest) as kept, open(kept, "wb") as good, open(left, "wb") as bad:
        for item in checked_records(spec):
            counts[type(item)] += 1
            if isinstance(item, Record):
                licenses[item.license or "unknown"] += 1
                splits[item.split or "unknown"] += 1
                if item.audio is not None:
                    audio_digest.update(state(item.audio))
            num_repeated += isinstance(item, Repetition)
            digest.update(_line(item, license_key="licence"))
            (good if isinstance(item, Record) else bad).write(_line(item))
        if not counts:
            raise DataError(f"{spec.root}: empty manifest" if spec.name == "nemo" else f"{spec.root}: holds no records")
    return Collected(
        counts[Record],
        counts.total() - counts[Record],
        num_repeated,
        digest.hexdigest(),
        audio_digest.hexdigest(),
        dict(sorted(licenses.items())),
        dict(sorted(splits.items())),
        CONTENT if hash_audio else SIZE_AND_TIME,
    )


def read_source(spec: SourceSpec) -> list[Record]:
    """All records of a source, each of which must be usable.

    Raises:
        DataError: one cannot be used, the source holds none or no audio, or cannot be read.
    """
    records: list[Record] = []
    rejected: list[Rejection] = []
    for item in checked_records(spec):
        if isinstance(item, Record):
            records.append(item)
        else:
            rejected.append(item)
    if rejected:
        raise DataError(
            f"{spec.root}: {len(rejected)} of {len(rejected) + len(records)} records cannot be used, first"
            f" {rejected[0].where}: {rejected[0].reason}; most prepare manifest --source {spec.name} sets them aside"
        )
    if not records:
        raise DataError(f"{spec.root}: holds no records")
    return records


class Repetition(Rejection):
    """A conversation that an earlier record has too: some data sets publish the whole beside its parts."""


def _size_and_time(path: Path) -> bytes:
    """What changes when a file is edited, unless someone takes care that it does not."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from None
    return f"{stat.st_size} {stat.st_mtime_ns}\n".encode()


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}") from None


def checked_records(spec: SourceSpec) -> Iterator[Record | Rejection]:
    """The records of a source with defaults filled in; those that cannot be used become rejections."""
    source, options = spec.open(), spec.options
    seen: set[bytes] = set()
    conversations: dict[bytes, str] = {}
    for item in source.records():
        if isinstance(item, Rejection):
            yield item
            continue
        try:
            digest = id_digest(item.id)
            if digest in seen:
                raise DataError(f"id {item.id!r} is already that of another record")
            if source.has_audio and options.needs_text and not item.text:
                raise DataError("has no text (for audio alone: --audio-only)")
            if item.turns:
                talk = id_digest("\0".join(part for turn in item.turns for part in (turn.role, turn.text)))
                if (first := conversations.setdefault(talk, item.where)) != item.where:
                    yield Repetition(item.where, f"is the conversation of {first} again", item.id)
                    continue
            record = replace(
                item,
                text=item.text.lower() if options.lower_case and item.text.isupper() else item.text,
                audio=None if item.audio is None else source.roots.resolve(item.audio),
                language=item.language or options.language,
                license=item.license or options.license or source.license,
            )
            _line(record)
            seen.add(digest)
            yield record
        except UnicodeEncodeError:
            yield Rejection(item.where, "holds text or a path that is not Unicode (half a surrogate pair)", item.id)
        except DataError as error:
            yield Rejection(item.where, str(error), item.id)


def _line(item: Record | Rejection, license_key: str = "license") -> bytes:
    """Raises UnicodeEncodeError for a record that is not Unicode; rejections, read by people only, are escaped."""
    if isinstance(item, Rejection):
        return json.dumps(item.to_entry(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    entry = {license_key if name == "license" else name: value for name, value in item.to_entry().items()}
    return json.dumps(entry | {"where": item.where}, ensure_ascii=False).encode() + b"\n"

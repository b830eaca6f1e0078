"""seed-tts-eval's lists of texts to speak: ``meta.lst``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_most.data.preparation.manifest import Record
from megatron_most.data.storage.json_lines import read_lines
from megatron_most.errors import DataError

SUFFIX = ".lst"
FIELDS = "utterance|prompt text|prompt audio|text, and the recording of the text in some sets"


PROMPT_VOICE = "voice of the list's prompt, which the model is not given"


class Entry(NamedTuple):
    """A line: what to speak, with its recording where the list has one, and the recording of a voice to imitate."""

    record: Record
    prompt: Record


def read_meta_list(path: str | Path) -> list[Entry]:
    """The lines of a list, which have the fields :data:`FIELDS`. Recordings are relative to the list's folder.

    Raises:
        DataError: a line (named by its number) has other fields, no text, or an utterance that an earlier one has.
    """
    folder, entries = Path(path).parent, dict[str, Entry]()
    for line in read_lines(path):
        where = f"{path}, line {line.number}"
        fields = [field.strip() for field in line.text.split("|")]
        if line.problem:
            raise DataError(f"{where}: {line.problem}")
        if fields == [""]:
            continue
        if len(fields) not in (4, 5) or not fields[0] or not fields[3]:
            raise DataError(f"{where}: must be {FIELDS}; got {len(fields)} fields")
        if fields[0] in entries:
            raise DataError(f"{where}: utterance {fields[0]!r} is already that of {entries[fields[0]].record.where}")
        recording = folder / fields[4] if len(fields) == 5 and fields[4] else None
        prompt = folder / fields[2] if fields[2] else None
        entries[fields[0]] = Entry(
            Record(fields[0], fields[3], recording, None, None, where=where),
            Record(fields[0], fields[1], prompt, None, None, where=where),
        )
    if not entries:
        raise DataError(f"{path}: empty list")
    return list(entries.values())

"""seed-tts-eval's lists of texts to speak: ``meta.lst``."""

from __future__ import annotations

from pathlib import Path

from megatron_most.data.preparation.manifest import Record
from megatron_most.data.storage.json_lines import read_lines
from megatron_most.errors import DataError

SUFFIX = ".lst"
FIELDS = "utterance|prompt text|prompt audio|text, and the recording of the text in some sets"


def read_meta_list(path: str | Path) -> list[Record]:
    """The texts of a list, whose lines have the fields :data:`FIELDS`. The prompt, a voice to imitate, is not used.

    Raises:
        DataError: a line (named by its number) has other fields, no text, or an utterance that an earlier one has.
    """
    records: dict[str, Record] = {}
    for line in read_lines(path):
        where = f"{path}, line {line.number}"
        fields = [field.strip() for field in line.text.split("|")]
        if line.problem:
            raise DataError(f"{where}: {line.problem}")
        if fields == [""]:
            continue
        if len(fields) not in (4, 5) or not fields[0] or not fields[3]:
            raise DataError(f"{where}: must be {FIELDS}; got {len(fields)} fields")
        if fields[0] in records:
            raise DataError(f"{where}: utterance {fields[0]!r} is already that of {records[fields[0]].where}")
        records[fields[0]] = Record(fields[0], fields[3], None, None, None, where=where)
    if not records:
        raise DataError(f"{path}: empty list")
    return list(records.values())

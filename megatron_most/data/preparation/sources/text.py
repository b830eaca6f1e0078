"""Text without audio: corpora as JSON lines, Parquet or plain text, and conversations (SmolTalk's ``messages``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_most.data.preparation.chat_files import check_roles
from megatron_most.data.preparation.manifest import Record, Rejection, parse_turns
from megatron_most.data.preparation.sources.base import Source
from megatron_most.data.storage.json_lines import Line, license_of, parse_json_object, text_of
from megatron_most.data.storage.parquet import read_rows
from megatron_most.errors import DataError


class TextCorpus(Source):
    """One document a line or row. In plain text files documents are paragraphs, with empty lines between."""

    name = "text"
    layout = "*.jsonl, *.jsonl.gz, *.parquet (field or column text) or *.txt (documents between empty lines)"
    has_audio = False
    default_field = "text"
    patterns: tuple[str, ...] = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.parquet", "**/*.txt", "**/*.txt.gz")

    def records(self) -> Iterator[Record | Rejection]:
        for path in self.files(*self.patterns):
            name = str(path.relative_to(self.folder)).split(".")[0]
            for number, entry in self._entries(path):
                where = f"{path}, {number}"
                if isinstance(entry, str):
                    yield Rejection(where, entry)
                    continue
                try:
                    identity = text_of(entry, "id") or f"{name}:{number.split()[1]}"
                    yield self._record(entry, identity, path, where)
                except DataError as error:
                    yield Rejection(where, str(error))

    def _record(self, entry: dict[str, Any], identity: str, path: Path, where: str) -> Record:
        text = (text_of(entry, self.options.text_field or self.default_field) or "").strip()
        if not text:
            raise DataError(f"{self.options.text_field or self.default_field}: is missing or empty")
        return Record(
            identity, text, None, None, None, language=text_of(entry, "language"), license=license_of(entry),
            split=self._split_of(path), where=where,
        )  # fmt: skip

    def _split_of(self, path: Path) -> str:
        """``train`` for ``train-00000-of-00009.parquet``, as the hub names parts, and for ``train/0.txt``."""
        name = super()._split_of(path).split("-")[0]
        return path.parent.name if name.isdigit() else name

    def _entries(self, path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """What to call each entry, and the entry, or why there is none."""
        if path.suffix == ".parquet":
            wanted = {self.options.text_field or self.default_field, "id", "language", "license", "licence"}
            for place, row in enumerate(read_rows(self.real(path), wanted), start=1):
                yield f"row {place}", row
        elif path.name.removesuffix(".gz").endswith(".txt"):
            yield from _paragraphs(self.lines(path))
        else:
            for line in self.lines(path):
                number = f"line {line.number}"
                if line.problem:
                    yield number, line.problem
                elif line.text.strip():
                    try:
                        yield number, parse_json_object(line.text)
                    except DataError as error:
                        yield number, str(error)


class Chat(TextCorpus):
    """Conversations: a list of messages with role and content, in the order that ``build --task chat`` needs."""

    name = "chat"
    layout = "*.parquet, *.jsonl or *.jsonl.gz with messages: [{role, content}, ...] (SmolTalk)"
    default_field = "messages"
    patterns = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.parquet")

    def _record(self, entry: dict[str, Any], identity: str, path: Path, where: str) -> Record:
        field = self.options.text_field or self.default_field
        turns = parse_turns(entry.get(field))
        if not turns:
            raise DataError(f"{field}: is missing")
        check_roles([turn.role for turn in turns])
        for place, turn in enumerate(turns):
            if not turn.text:
                raise DataError(f"{field}[{place}]: is empty")
        return Record(
            identity, "", None, None, None, language=text_of(entry, "language"), license=license_of(entry),
            split=self._split_of(path), turns=turns, where=where,
        )  # fmt: skip


def _paragraphs(lines_of_file: Iterator[Line]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    start, lines = 0, []
    for line in lines_of_file:
        if line.problem:
            yield f"line {line.number}", line.problem
        if line.text.strip():
            start = start or line.number
            lines.append(line.text)
        elif lines and not line.problem:
            yield f"line {start}", {"text": "\n".join(lines)}
            start, lines = 0, []
    if lines:
        yield f"line {start}", {"text": "\n".join(lines)}

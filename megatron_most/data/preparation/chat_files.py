"""Conversations on disk, and which of their turns are spoken.

A chat file is JSON lines; a line is ``{"id": ..., "messages": [{"role": ..., "content": ..., "audio": ...}, ...]}``.
Roles are ``system`` (first or not at all), then ``user`` and ``assistant`` in alternation. ``audio`` is the id of an
utterance of tokenized speech and optional: such a turn can be spoken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_most.data.storage.json_lines import license_of, parse_json_object, read_lines
from megatron_most.errors import DataError

MAX_FAILED = 0.05
"""Share of the turns to speak that may fail; more is taken for a broken synthesizer."""


@dataclass(frozen=True)
class Message:
    """One turn as stored on disk; ``audio`` is the id of its utterance."""

    role: str
    content: str
    audio: str | None


@dataclass(frozen=True)
class Chat:
    """A conversation. ``exchanges`` are pairs of a user's and an assistant's message; ``license`` covers the text."""

    id: str
    system: Message | None
    exchanges: tuple[tuple[Message, Message], ...]
    license: str | None = None

    def messages(self) -> Iterator[Message]:
        if self.system:
            yield self.system
        for exchange in self.exchanges:
            yield from exchange


def read_chats(path: str | Path) -> Iterator[Chat]:
    """Conversations of a chat file, one after the other.

    Raises:
        DataError: an unreadable or empty file; a line (named by its number) that breaks the format or repeats an id.
    """
    seen: set[str] = set()
    for line in read_lines(path):
        where = f"{path}, line {line.number}"
        if line.problem:
            raise DataError(f"{where}: {line.problem}")
        if not line.text.strip():
            continue
        try:
            chat = _parse(line.text, f"{Path(path).stem}:{line.number}")
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if chat.id in seen:
            raise DataError(f"{where}: id {chat.id!r} is already that of another line")
        seen.add(chat.id)
        yield chat
    if not seen:
        raise DataError(f"{path}: empty chat file")


def check_roles(roles: Sequence[str]) -> None:
    """Raise :class:`DataError` unless these are the roles of a conversation's messages."""
    turns = list(roles[1:] if roles[:1] == ["system"] else roles)
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        found = " ".join(turns) or "none"
        raise DataError(f"after the system's, messages must be of user and assistant in turn, found {found}")


def _parse(line: str, default_id: str) -> Chat:
    entry = parse_json_object(line)
    if not isinstance(entry.get("messages"), list):
        raise DataError("must be a JSON object with a list of messages")
    messages = [_message(value, f"message {place}") for place, value in enumerate(entry["messages"], start=1)]
    check_roles([message.role for message in messages])
    system = messages.pop(0) if messages[0].role == "system" else None
    pairs = tuple(zip(messages[::2], messages[1::2], strict=True))
    return Chat(str(entry.get("id", default_id)), system, pairs, license_of(entry))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be a JSON object")
    role, content, audio = value.get("role"), value.get("content"), value.get("audio")
    if role not in ("system", "user", "assistant"):
        raise DataError(f"{where}: role={role!r}: must be system, user or assistant")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: content={content!r}: must be a text that is not empty")
    if audio is not None and not isinstance(audio, str):
        raise DataError(f"{where}: audio={audio!r}: must be the id of an utterance")
    return Message(role, content.strip(), audio)

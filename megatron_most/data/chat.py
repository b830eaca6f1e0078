"""Conversations on disk, and which of their turns are spoken.

A chat file is JSON lines; a line is ``{"id": ..., "messages": [{"role": ..., "content": ..., "audio": ...}, ...]}``.
Roles are ``system`` (first or not at all), then ``user`` and ``assistant`` in alternation. ``audio`` is the id of an
utterance of tokenised speech and optional: such a turn can be spoken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_most.data.instructions import fraction
from megatron_most.errors import ConfigError, DataError

MODES = ("T-T", "S-T", "T-S", "S-S")
"""What an exchange is: the user's turn, then the assistant's; T is text, S is speech."""


@dataclass(frozen=True)
class Message:
    """One turn as it is on disk; ``audio`` is the id of the utterance that speaks it."""

    role: str
    content: str
    audio: str | None


@dataclass(frozen=True)
class Chat:
    """A conversation; :attr:`exchanges` are pairs of a user's and an assistant's message."""

    id: str
    system: Message | None
    exchanges: tuple[tuple[Message, Message], ...]

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
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                chat = _parse(line, where, f"{Path(path).stem}:{number}")
                if chat.id in seen:
                    raise DataError(f"{where}: id {chat.id!r} is already that of another line")
                seen.add(chat.id)
                yield chat
    except FileNotFoundError:
        raise DataError(f"{path}: no such chat file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable: {error}") from None
    if not seen:
        raise DataError(f"{path}: empty chat file")


def _parse(line: str, where: str, default_id: str) -> Chat:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("messages"), list):
        raise DataError(f"{where}: must be a JSON object with a list of messages")
    messages = [_message(value, f"{where}, message {place}") for place, value in enumerate(entry["messages"], start=1)]
    system = messages.pop(0) if messages and messages[0].role == "system" else None
    roles = [message.role for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        found = " ".join(roles) or "none"
        raise DataError(f"{where}: after the system's, messages must be of user and assistant in turn, found {found}")
    pairs = tuple(zip(messages[::2], messages[1::2], strict=True))
    return Chat(str(entry.get("id", default_id)), system, pairs)


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


def check_modes(modes: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless ``modes`` are some of :data:`MODES`."""
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"modes={mode!r}: must be one of {', '.join(MODES)}")
    if not modes:
        raise ConfigError(f"modes=[]: needs at least one of {', '.join(MODES)}")


def choose_mode(chat: Chat, place: int, modes: Sequence[str], spoken: set[str] | dict[str, object]) -> str | None:
    """The mode of exchange ``place``, drawn in equal shares from those of ``modes`` that its recordings allow.

    Args:
        spoken: ids of the utterances that are there.

    Returns:
        None when the recordings allow none.
    """
    user, assistant = (message.audio in spoken for message in chat.exchanges[place])
    possible = [mode for mode in modes if (user or mode[0] == "T") and (assistant or mode[2] == "T")]
    return possible[int(fraction("mode", chat.id, place) * len(possible))] if possible else None

"""Which turns of a conversation are spoken."""

from __future__ import annotations

from collections.abc import Container, Sequence

from megatron_most.data.preparation.chat_files import Chat
from megatron_most.data.preparation.keyed_choice import choose
from megatron_most.errors import ConfigError

MODES = ("T-T", "S-T", "T-S", "S-S")
"""Modes of an exchange: the user's turn, then the assistant's; T is written (text), S is spoken."""


def check_modes(modes: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless ``modes`` are one or more of :data:`MODES`."""
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"modes={mode!r}: must be one of {', '.join(MODES)}")
    if not modes:
        raise ConfigError(f"modes=[]: must be at least one of {', '.join(MODES)}")


def choose_modes(chat: Chat, modes: Sequence[str], recorded: Container[str | None]) -> list[str]:
    """The mode of each exchange, drawn with equal probability from those ``modes`` that its recordings allow.

    Args:
        recorded: ids of the utterances that a spoken turn may use.

    Returns:
        An empty list if some exchange has no allowed mode.
    """
    chosen = []
    for place, (user, assistant) in enumerate(chat.exchanges):
        allowed = [
            mode
            for mode in modes
            if (mode[0] == "T" or user.audio in recorded) and (mode[2] == "T" or assistant.audio in recorded)
        ]
        if not allowed:
            return []
        chosen.append(choose(allowed, "mode", chat.id, place))
    return chosen
